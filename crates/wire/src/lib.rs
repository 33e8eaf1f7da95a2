//! Every encoding of Barid: the generated protobuf types, records and frames in JSON, and the conversions to
//! the types of `barid-core`.

pub mod envelope;
pub mod frames;
pub mod record;
pub mod revocation;

/// Generated from `proto/barid/v1/{envelope,record,frames}.proto`.
#[allow(missing_docs, clippy::all)]
pub mod v1 {
    tonic::include_proto!("barid.v1");
}

/// Generated from `proto/barid/v1/internal.proto`: gRPC between roles.
#[allow(missing_docs, clippy::all)]
pub mod internal {
    tonic::include_proto!("barid.internal.v1");
}

/// The first `max` bytes of a text at most, cut between characters.
pub fn cut(text: &str, max: usize) -> String {
    let fits = |(at, c): &(usize, char)| at + c.len_utf8() <= max;
    text.char_indices().take_while(fits).map(|(_, c)| c).collect()
}
