//! Compiles the .proto files without protoc.
fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=../../proto");
    let files = [
        "barid/v1/envelope.proto",
        "barid/v1/record.proto",
        "barid/v1/frames.proto",
        "barid/v1/internal.proto",
    ];
    let descriptors = protox::compile(files, ["../../proto"])?;
    tonic_prost_build::configure()
        .bytes(".barid")
        // Most pushes are for users, and are moved through queues.
        .boxed(".barid.internal.v1.Push.audience")
        .compile_fds(descriptors)?;
    Ok(())
}
