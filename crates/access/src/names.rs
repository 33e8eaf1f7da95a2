//! Names that devices and businesses choose (platforms, SDKs, apps) as label values: a bounded set of them.

use std::collections::HashMap;

use parking_lot::Mutex;
use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

/// Label of all names beyond the bound.
const OTHER: &str = "other";
/// Label of sessions without a name.
const NONE: &str = "none";

/// Counts sessions, and bytes to their devices, by up to `names_max` names. A name without a session gives its place to
/// a new one; its metrics are no longer exported then.
#[derive(Debug)]
pub struct Names {
    names_max: usize,
    vectors: Vectors,
    none: Metrics,
    other: Metrics,
    named: Mutex<Named>,
}

#[derive(Debug)]
struct Vectors {
    sessions: IntGaugeVec,
    bytes: Option<IntCounterVec>,
}

#[derive(Debug)]
struct Metrics {
    sessions: IntGauge,
    bytes: Option<IntCounter>,
}

#[derive(Debug, Default)]
struct Named {
    places: Vec<Place>,
    by_name: HashMap<String, u16>,
    /// Places without a session, the one that was left last at the end.
    free: Vec<u16>,
}

#[derive(Debug)]
struct Place {
    name: String,
    metrics: Metrics,
    sessions: u64,
}

/// Where a session is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Name {
    /// It has none.
    None,
    /// With all that have no place.
    Other,
    /// At this place.
    Named(u16),
}

impl Names {
    /// Exports up to `names_max` names, and all others as one.
    pub fn new(sessions: IntGaugeVec, bytes: Option<IntCounterVec>, names_max: usize) -> Self {
        let vectors = Vectors { sessions, bytes };
        let [none, other] = [NONE, OTHER].map(|name| vectors.of(name));
        Self { names_max, vectors, none, other, named: Mutex::default() }
    }

    /// Counts a session. [`Self::leave`] must follow.
    pub fn enter(&self, name: &str) -> Name {
        if name.is_empty() {
            self.none.sessions.inc();
            return Name::None;
        }
        let place = self.named.lock().enter(&label(name), self.names_max, &self.vectors);
        place.map_or_else(
            || {
                self.other.sessions.inc();
                Name::Other
            },
            Name::Named,
        )
    }

    /// The counter of bytes to sessions of a name; `None` if bytes are not counted.
    pub fn bytes(&self, name: Name) -> Option<IntCounter> {
        match name {
            Name::None => self.none.bytes.clone(),
            Name::Other => self.other.bytes.clone(),
            Name::Named(place) => {
                let named = self.named.lock();
                named.places.get(usize::from(place)).and_then(|place| place.metrics.bytes.clone())
            }
        }
    }

    /// Ends a session's count.
    pub fn leave(&self, name: Name) {
        match name {
            Name::None => self.none.sessions.dec(),
            Name::Other => self.other.sessions.dec(),
            Name::Named(place) => self.named.lock().leave(place),
        }
    }
}

impl Vectors {
    fn of(&self, name: &str) -> Metrics {
        Metrics {
            sessions: self.sessions.with_label_values(&[name]),
            bytes: self.bytes.as_ref().map(|bytes| bytes.with_label_values(&[name])),
        }
    }

    fn forget(&self, name: &str) {
        let _ = self.sessions.remove_label_values(&[name]);
        if let Some(bytes) = &self.bytes {
            let _ = bytes.remove_label_values(&[name]);
        }
    }
}

impl Named {
    fn enter(&mut self, name: &str, names_max: usize, vectors: &Vectors) -> Option<u16> {
        let index = match self.by_name.get(name) {
            Some(index) => *index,
            None => self.add(name, names_max, vectors)?,
        };
        let place = self.places.get_mut(usize::from(index))?;
        if place.sessions == 0 {
            self.free.retain(|free| *free != index);
        }
        place.sessions += 1;
        place.metrics.sessions.inc();
        Some(index)
    }

    /// Gives a name a place of its own, or that of a name without a session. Such a name is exported as 0 until then.
    fn add(&mut self, name: &str, names_max: usize, vectors: &Vectors) -> Option<u16> {
        if self.places.len() >= names_max && self.free.is_empty() {
            return None;
        }
        let new = || Place { name: name.to_owned(), metrics: vectors.of(name), sessions: 0 };
        let index = if self.places.len() < names_max {
            let index = u16::try_from(self.places.len()).ok()?;
            self.places.push(new());
            index
        } else {
            // The one that has been unused for longest.
            let index = self.free.remove(0);
            let place = self.places.get_mut(usize::from(index))?;
            vectors.forget(&place.name);
            self.by_name.remove(&place.name);
            *place = new();
            index
        };
        self.by_name.insert(name.to_owned(), index);
        Some(index)
    }

    fn leave(&mut self, index: u16) {
        let Some(place) = self.places.get_mut(usize::from(index)) else { return };
        place.metrics.sessions.dec();
        place.sessions = place.sessions.saturating_sub(1);
        if place.sessions == 0 {
            self.free.push(index);
        }
    }
}

/// A name for a label: what a device writes may be any text, and the two labels that are not names are taken.
fn label(name: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._/-".contains(c) { c } else { '-' };
    let name: String = name.chars().map(plain).collect();
    if [NONE, OTHER].contains(&&*name) { format!("-{name}") } else { name }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus::Opts;

    fn platforms(names_max: usize) -> (Names, IntGaugeVec) {
        let gauges = IntGaugeVec::new(Opts::new("sessions", "Sessions."), &["platform"]).unwrap();
        (Names::new(gauges.clone(), None, names_max), gauges)
    }

    #[test]
    fn the_first_platforms_have_names_and_the_rest_one_together() {
        let (platforms, gauges) = platforms(3);
        for platform in ["ios", "a b\n", "other", "third", "fourth", "ios", ""] {
            platforms.enter(platform);
        }
        let fourth = platforms.enter("fourth");
        platforms.leave(fourth);
        let of = |name: &str| gauges.with_label_values(&[name]).get();
        assert_eq!(["ios", "a-b-", "-other", "other", "none"].map(of), [2, 1, 1, 2, 1]);
    }

    #[test]
    fn hazard_106_a_name_that_no_session_uses_gives_way() {
        let (platforms, gauges) = platforms(2);
        let exported = || {
            use prometheus::core::Collector as _;
            let mut names: Vec<_> = gauges.collect()[0]
                .get_metric()
                .iter()
                .map(|metric| {
                    (metric.get_label()[0].value().to_owned(), metric.get_gauge().get_value())
                })
                .collect();
            names.sort_by(|a, b| a.0.cmp(&b.0));
            names
        };
        let junk = ["x1", "x2", "x3"].map(|name| platforms.enter(name));
        let ios = platforms.enter("ios");
        assert_eq!([junk[2], ios], [Name::Other; 2]);
        junk.into_iter().for_each(|session| platforms.leave(session));
        let again = platforms.enter("x2");
        let named = platforms.enter("ios");
        assert_ne!(named, Name::Other, "x1 has no session");
        assert_eq!(platforms.enter("android"), Name::Other, "two are in use");
        // One that was counted among the others still is.
        platforms.leave(ios);
        let expected = [("ios", 1.0), ("none", 0.0), ("other", 1.0), ("x2", 1.0)];
        assert_eq!(exported(), expected.map(|(name, count)| (name.to_owned(), count)));
        [again, named].into_iter().for_each(|session| platforms.leave(session));
        assert!(matches!(platforms.enter("android"), Name::Named(_)));
    }

    #[test]
    fn bytes_are_counted_by_name_and_forgotten_with_it() {
        use prometheus::{IntCounterVec, Opts};
        let (_, gauges) = platforms(1);
        let bytes = IntCounterVec::new(Opts::new("bytes", "Bytes."), &["app"]).unwrap();
        let names = Names::new(gauges, Some(bytes.clone()), 1);
        let shop = names.enter("shop");
        names.bytes(shop).unwrap().inc_by(7);
        names.bytes(names.enter("blog")).unwrap().inc_by(2);
        let of = |name: &str| bytes.with_label_values(&[name]).get();
        assert_eq!((of("shop"), of("other")), (7, 2));
        names.leave(shop);
        names.bytes(names.enter("news")).unwrap().inc_by(1);
        assert_eq!((of("news"), of("shop")), (1, 0));
    }
}
