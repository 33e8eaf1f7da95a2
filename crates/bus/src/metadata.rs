//! The metadata of a commit: which topic the offset belongs to, and the positions that shards must know.
//!
//! `source;v1;base64`. The source is `i:` and the topic's id, or `n:` and its name. Packed behind it:
//! the topic's id where the source is its name (length, bytes; length 0: none); a table of the leader
//! epochs that are used below; the first offset taken of each of the last epochs; the highest position
//! that each shard has confirmed. Numbers are varints, signed ones zigzag. Offsets are stored as the
//! committed offset minus the offset, shards as the difference to the one before.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use barid_core::LogPosition;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD as BASE64;

use crate::ledger::Confirmed;

/// Bound of the leader epochs that are kept.
pub const EPOCHS_MAX: usize = 8;

/// The identity of a topic, in commits and in Redis's positions. A topic that is recreated has another id.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum TopicSource {
    /// Its id (base64).
    Id(Arc<str>),
    /// Its name, if the broker reported no id when its first offset was committed.
    Name(Arc<str>),
}

impl TopicSource {
    /// The id or the name.
    pub fn name(&self) -> &Arc<str> {
        let (Self::Id(name) | Self::Name(name)) = self;
        name
    }

    fn tagged(&self) -> String {
        match self {
            Self::Id(id) => format!("i:{id}"),
            Self::Name(name) => format!("n:{name}"),
        }
    }

    fn parse(tagged: &str) -> Option<Self> {
        match tagged.split_at_checked(2)? {
            ("i:", id) if !id.is_empty() => Some(Self::Id(id.into())),
            ("n:", name) if !name.is_empty() => Some(Self::Name(name.into())),
            _ => None,
        }
    }
}

/// State that a partition's next owner needs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Memory {
    /// The highest position that each shard has confirmed.
    pub confirmed: Confirmed,
    /// The first offset that was taken in each of the latest leader epochs.
    pub epochs: BTreeMap<i32, i64>,
}

/// A commit's metadata.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metadata {
    /// The topic that the offset belongs to; `None` if the commit was not made by a purger or does not contain it.
    pub source: Option<TopicSource>,
    /// The topic's id, if known. Another id at the next assignment means that the topic was recreated.
    pub id: Option<Arc<str>>,
    /// State for the next owner.
    pub memory: Memory,
}

impl Metadata {
    /// Encodes it for a commit of `offset`, in at most `bytes_max` bytes. Also returns how many shards did
    /// not fit; those with the lowest positions are left out first.
    pub fn encode(&self, offset: i64, bytes_max: usize) -> (String, usize) {
        let all = self.memory.confirmed.len();
        let tagged = self.source.as_ref().map(TopicSource::tagged).unwrap_or_default();
        if tagged.len() > bytes_max {
            return (String::new(), all);
        }
        let mut shards: Vec<(u16, LogPosition)> =
            self.memory.confirmed.iter().map(|(shard, at)| (*shard, *at)).collect();
        shards.sort_unstable_by_key(|(shard, at)| (std::cmp::Reverse(*at), *shard));
        loop {
            let text = format!("{tagged};v1;{}", BASE64.encode(self.pack(offset, &shards)));
            if text.len() <= bytes_max {
                return (text, all - shards.len());
            }
            if shards.is_empty() {
                return (tagged, all);
            }
            shards.truncate(shards.len() - shards.len().div_ceil(16));
        }
    }

    fn pack(&self, offset: i64, shards: &[(u16, LogPosition)]) -> Vec<u8> {
        let mut packed = Vec::new();
        // An id that is the source is not stored twice.
        let named = matches!(self.source, Some(TopicSource::Name(_)));
        let id = self.id.as_deref().filter(|id| named && id.len() < 128).unwrap_or_default();
        put(&mut packed, id.len() as u64);
        packed.extend_from_slice(id.as_bytes());
        let epochs = &self.memory.epochs;
        let table: BTreeSet<i32> =
            epochs.keys().copied().chain(shards.iter().map(|(_, at)| at.leader_epoch)).collect();
        let table: Vec<i32> = table.into_iter().collect();
        let number = |epoch: &i32| table.binary_search(epoch).unwrap_or_default() as u64;
        put(&mut packed, table.len() as u64);
        table.iter().for_each(|epoch| put(&mut packed, zigzag(i64::from(*epoch))));
        put(&mut packed, epochs.len() as u64);
        for (epoch, first) in epochs {
            put(&mut packed, number(epoch));
            put(&mut packed, zigzag(offset.wrapping_sub(*first)));
        }
        let shards: Confirmed = shards.iter().copied().collect();
        put(&mut packed, shards.len() as u64);
        let mut next = 0;
        for (shard, at) in &shards {
            put(&mut packed, u64::from(*shard) - next);
            put(&mut packed, number(&at.leader_epoch));
            put(&mut packed, zigzag(offset.wrapping_sub(at.offset)));
            put(&mut packed, u64::from(at.index));
            next = u64::from(*shard) + 1;
        }
        packed
    }

    /// Decodes the metadata of a commit of `offset`. Unreadable metadata counts as empty: the offset is
    /// valid without it.
    pub fn decode(text: &[u8], offset: i64) -> Self {
        let text = std::str::from_utf8(text).unwrap_or_default();
        let (source, rest) = text.split_once(';').unwrap_or((text, ""));
        let source = TopicSource::parse(source);
        let packed = rest.strip_prefix("v1;").and_then(|text| BASE64.decode(text).ok());
        let read = packed.filter(|_| source.is_some()).and_then(|packed| unpack(&packed, offset));
        let (id, memory) = read.unwrap_or_default();
        let id = match &source {
            Some(TopicSource::Id(id)) => Some(Arc::clone(id)),
            _ => id,
        };
        Self { source, id, memory }
    }
}

fn unpack(mut packed: &[u8], offset: i64) -> Option<(Option<Arc<str>>, Memory)> {
    let packed = &mut packed;
    let length = usize::try_from(get(packed)?).ok()?;
    let (id, rest) = packed.split_at_checked(length)?;
    *packed = rest;
    let id = std::str::from_utf8(id).ok().filter(|id| !id.is_empty()).map(Arc::from);
    let mut table = Vec::new();
    for _ in 0..get(packed)? {
        table.push(i32::try_from(unzigzag(get(packed)?)).ok()?);
    }
    let epoch = |packed: &mut &[u8]| table.get(usize::try_from(get(packed)?).ok()?).copied();
    let below = |packed: &mut &[u8]| {
        let at = offset.checked_sub(unzigzag(get(packed)?))?;
        (at >= 0).then_some(at)
    };
    let mut memory = Memory::default();
    for _ in 0..get(packed)? {
        memory.epochs.insert(epoch(packed)?, below(packed)?);
    }
    let mut next = 0_u64;
    for _ in 0..get(packed)? {
        let shard = next.checked_add(get(packed)?)?;
        let leader_epoch = epoch(packed)?;
        let offset = below(packed)?;
        let index = u32::try_from(get(packed)?).ok()?;
        let at = LogPosition { leader_epoch, offset, index };
        memory.confirmed.insert(u16::try_from(shard).ok()?, at);
        next = shard + 1;
    }
    Some((id, memory))
}

fn put(packed: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        packed.push(number as u8 | 0x80);
        number >>= 7;
    }
    packed.push(number as u8);
}

fn get(packed: &mut &[u8]) -> Option<u64> {
    let mut number = 0_u64;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = packed.split_first()?;
        *packed = rest;
        number |= u64::from(byte & 0x7f).checked_shl(shift)?;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

fn zigzag(number: i64) -> u64 {
    ((number << 1) ^ (number >> 63)) as u64
}

fn unzigzag(number: u64) -> i64 {
    ((number >> 1) as i64) ^ -((number & 1) as i64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn metadata(shards: u16, spread: i64) -> Metadata {
        let at = |shard: u16| LogPosition {
            leader_epoch: 41 + i32::from(shard % 2),
            offset: 5_000_000_000 - i64::from(shard) * spread,
            index: u32::from(shard % 3),
        };
        Metadata {
            source: Some(TopicSource::Id("mXn2yJvRQ4yW1f3kD0aZ8g".into())),
            id: Some("mXn2yJvRQ4yW1f3kD0aZ8g".into()),
            memory: Memory {
                confirmed: (0..shards).map(|shard| (shard, at(shard))).collect(),
                epochs: [(41, 17), (42, 4_900_000_000)].into(),
            },
        }
    }

    #[test]
    fn what_a_commit_says_is_short_and_reads_back() {
        for (shards, bytes) in [(64, 600), (128, 1_200), (256, 2_400)] {
            let metadata = metadata(shards, 977);
            let (text, left_out) = metadata.encode(5_000_000_000, 3_000);
            assert_eq!((left_out, text.len() <= bytes), (0, true), "{} bytes", text.len());
            assert!(text.starts_with("i:mXn2yJvRQ4yW1f3kD0aZ8g;v1;"));
            assert_eq!(Metadata::decode(text.as_bytes(), 5_000_000_000), metadata);
        }
    }

    #[test]
    fn over_its_bound_the_lowest_positions_are_left_out_first() {
        let metadata = metadata(256, 977);
        let (text, left_out) = metadata.encode(5_000_000_000, 700);
        assert!(text.len() <= 700 && left_out > 0);
        let kept = Metadata::decode(text.as_bytes(), 5_000_000_000).memory.confirmed;
        let mut all: Vec<_> =
            metadata.memory.confirmed.into_iter().map(|(s, at)| (at, s)).collect();
        all.sort_unstable_by(|a, b| b.cmp(a));
        let mut highest: Vec<u16> = all[..256 - left_out].iter().map(|(_, shard)| *shard).collect();
        highest.sort_unstable();
        assert_eq!(kept.into_keys().collect::<Vec<_>>(), highest);
    }

    #[test]
    fn what_does_not_fit_leaves_the_source_and_at_last_nothing() {
        let metadata = metadata(64, 1);
        assert_eq!(metadata.encode(7, 24), ("i:mXn2yJvRQ4yW1f3kD0aZ8g".into(), 64));
        assert_eq!(metadata.encode(7, 23), (String::new(), 64));
        let alone = Metadata::decode(b"i:mXn2yJvRQ4yW1f3kD0aZ8g", 7);
        assert_eq!((alone.source, alone.memory), (metadata.source, Memory::default()));
    }

    #[test]
    fn a_topic_known_by_its_name_keeps_the_id_that_was_seen() {
        let mut metadata = metadata(2, 1);
        metadata.source = Some(TopicSource::Name("barid.push".into()));
        let (text, _) = metadata.encode(9, 3_000);
        assert!(text.starts_with("n:barid.push;v1;"));
        assert_eq!(Metadata::decode(text.as_bytes(), 9), metadata);
    }

    #[test]
    fn what_others_write_is_no_source_and_no_memory() {
        let nothing = Metadata { source: None, id: None, memory: Memory::default() };
        for text in ["", "mXn2yJvRQ4yW1f3kD0aZ8g", "i:", "x:y", ";v1;AAAA", "\u{e9}"] {
            assert_eq!(Metadata::decode(text.as_bytes(), 5), nothing, "{text}");
        }
        for rest in ["v2;AAAA", "v1;!", "v1;////////////////", "v1;AAAB", "", "v1;"] {
            let read = Metadata::decode(format!("i:a;{rest}").as_bytes(), 5);
            assert_eq!(read.source, Some(TopicSource::Id("a".into())));
            assert_eq!(read.memory, Memory::default(), "{rest}");
        }
        assert_eq!(Metadata::decode(&[0xff, b';'], 5), nothing);
    }

    fn position() -> impl Strategy<Value = LogPosition> {
        let offset = prop_oneof![0..1000_i64, Just(i64::MAX), 0..=i64::MAX];
        (any::<i32>(), offset, any::<u32>()).prop_map(|(leader_epoch, offset, index)| LogPosition {
            leader_epoch,
            offset,
            index,
        })
    }

    proptest! {
        #[test]
        fn any_memory_reads_back_and_any_bytes_do_no_harm(
            offset in prop_oneof![0..2000_i64, 0..=i64::MAX],
            confirmed in prop::collection::btree_map(any::<u16>(), position(), 0..80),
            epochs in prop::collection::btree_map(any::<i32>(), 0..=i64::MAX, 0..EPOCHS_MAX),
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            bytes_max in 0..2000_usize,
        ) {
            let source = Some(TopicSource::Id("a".into()));
            let metadata =
                Metadata { source, id: Some("a".into()), memory: Memory { confirmed, epochs } };
            let (text, left_out) = metadata.encode(offset, usize::MAX);
            prop_assert_eq!(left_out, 0);
            prop_assert_eq!(Metadata::decode(text.as_bytes(), offset), metadata.clone());
            let (text, left_out) = metadata.encode(offset, bytes_max);
            prop_assert!(text.len() <= bytes_max);
            let kept = Metadata::decode(text.as_bytes(), offset).memory.confirmed;
            prop_assert_eq!(kept.len() + left_out, metadata.memory.confirmed.len());
            let _ = Metadata::decode(&bytes, offset);
            let _ = Metadata::decode(format!("i:a;v1;{}", BASE64.encode(&bytes)).as_bytes(), offset);
        }
    }
}
