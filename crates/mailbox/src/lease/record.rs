//! Encoding of a node's record: names and values, so that readers ignore unknown fields.

use std::collections::HashMap;

use barid_core::limits::WIRE_NUMBER_MAX;
use barid_core::{Incarnation, NodeId};

use super::node::{NodeRecord, NodeRole};
use super::state::Stamp;
use crate::layout::LAYOUT;

/// Encodes a record as names and values, without the incarnation, which is part of the stamp.
pub(super) fn fields(record: &NodeRecord) -> Vec<(&'static str, String)> {
    let state = if record.draining { "draining" } else { "serving" };
    vec![
        ("role", record.role.as_str().to_owned()),
        ("address", record.address.clone()),
        ("load", record.load.to_string()),
        ("state", state.to_owned()),
        ("zone", record.zone.clone()),
        ("admin", record.admin.clone()),
        ("devices", record.devices.clone()),
        ("confirmed", u8::from(record.confirmed).to_string()),
        ("layout", LAYOUT.to_string()),
    ]
}

/// Encodes these fields for a copy.
pub(super) fn text(fields: &[(&str, String)]) -> String {
    let pairs: Vec<String> =
        fields.iter().map(|(name, value)| format!("{name}\0{value}")).collect();
    pairs.join("\0")
}

/// One copy of a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Copy {
    pub stamp: Stamp,
    /// When the lease ends, ms in the time of the master that holds the copy.
    pub ends: u64,
    /// Whether the lease was released.
    pub released: bool,
    /// The key layout of its process.
    pub layout: Option<u32>,
    /// `None`: unreadable, perhaps written by a newer version.
    pub record: Option<NodeRecord>,
}

impl Copy {
    /// Parses the copy of `id`; `None`: malformed.
    pub fn parse(id: &NodeId, text: &str) -> Option<Self> {
        let mut words = text.splitn(5, ' ');
        let mut number = || self::number(words.next()?);
        let stamp = Stamp { incarnation: Incarnation(number()?), number: number()? };
        let ends = number()?;
        let released = words.next()? == "G";
        let mut parts = words.next().unwrap_or_default().split('\0');
        let mut fields = HashMap::new();
        while let (Some(name), Some(value)) = (parts.next(), parts.next()) {
            fields.insert(name, value);
        }
        let record = record(id, stamp, |name| fields.get(name).copied());
        let layout = fields.get("layout").and_then(|layout| layout.parse().ok());
        Some(Self { stamp, ends, released, layout, record })
    }
}

/// Parses the fields of a node's own key.
pub(crate) fn own(id: &NodeId, fields: &HashMap<String, String>) -> Option<(Stamp, NodeRecord)> {
    let field = |name: &str| fields.get(name).map(String::as_str);
    let incarnation = Incarnation(number(field("incarnation")?)?);
    let stamp = Stamp { incarnation, number: number(field("number").unwrap_or("0"))? };
    Some((stamp, record(id, stamp, field)?))
}

/// Parses a number up to `WIRE_NUMBER_MAX`: incarnations and renewals are incremented, and loads summed.
fn number(text: &str) -> Option<u64> {
    text.parse().ok().filter(|number| *number <= WIRE_NUMBER_MAX)
}

fn record<'a>(
    id: &NodeId,
    stamp: Stamp,
    field: impl Fn(&str) -> Option<&'a str>,
) -> Option<NodeRecord> {
    let text = |name: &str| field(name).unwrap_or_default().to_owned();
    let role = NodeRole::parse(field("role")?)?;
    Some(NodeRecord {
        load: number(field("load")?)?,
        draining: field("state")? == "draining",
        zone: text("zone"),
        admin: text("admin"),
        devices: text("devices"),
        confirmed: field("confirmed") == Some("1"),
        ..NodeRecord::new(role, id.clone(), stamp.incarnation, field("address")?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hazard_61_a_lease_with_a_number_beyond_its_bounds_is_none() {
        let id = NodeId::new("n").unwrap();
        for n in [0, 1, WIRE_NUMBER_MAX, WIRE_NUMBER_MAX + 1, 1 << 63, u64::MAX] {
            let fits = n <= WIRE_NUMBER_MAX;
            let copy = |text: String| Copy::parse(&id, &text);
            for text in [format!("{n} 1 1 H "), format!("1 {n} 1 H "), format!("1 1 {n} H ")] {
                assert_eq!(copy(text).is_some(), fits, "{n}");
            }
            let fields = format!("role\0access\0address\0h:1\0state\0serving\0load\0{n}");
            let copy = copy(format!("1 1 1 H {fields}")).unwrap();
            assert_eq!(copy.record.is_some(), fits, "{n}");
            let own = |name: &str| {
                let least = [("role", "access"), ("address", "h:1"), ("state", "serving")];
                let mut fields: HashMap<String, String> =
                    least.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
                for other in ["incarnation", "number", "load"] {
                    let value = if other == name { n } else { 1 };
                    fields.insert(other.to_owned(), value.to_string());
                }
                super::own(&id, &fields).is_some()
            };
            assert!(["incarnation", "number", "load"].iter().all(|name| own(name) == fits), "{n}");
        }
    }

    #[test]
    fn a_record_survives_its_copy_and_unknown_fields_are_passed_over() {
        let id = NodeId::new("n").unwrap();
        let record = NodeRecord {
            load: 3,
            draining: true,
            zone: "a zone, with = and spaces".into(),
            devices: "wss://h/".into(),
            ..NodeRecord::new(NodeRole::Access, id.clone(), Incarnation(7), "[::1]:7081")
        };
        let text = text(&fields(&record));
        let copy = Copy::parse(&id, &format!("7 12 1000 H {text}\0city\0riyadh")).unwrap();
        let stamp = Stamp { incarnation: Incarnation(7), number: 12 };
        assert_eq!((copy.stamp, copy.ends, copy.released), (stamp, 1000, false));
        assert_eq!(copy.record, Some(record));
        let newer = Copy::parse(&id, "7 12 1000 G role\0newer").unwrap();
        assert_eq!((newer.released, newer.record), (true, None));
        assert_eq!(Copy::parse(&id, "7 x"), None);
    }
}
