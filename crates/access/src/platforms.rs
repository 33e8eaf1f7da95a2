//! Sessions by platform, as devices name theirs: a bounded set of names.

use std::collections::HashMap;

use parking_lot::Mutex;
use prometheus::{IntGauge, IntGaugeVec};

/// Label of all platforms beyond the bound.
const OTHER: &str = "other";
/// Label of devices that name no platform.
const NONE: &str = "none";

/// The gauges of up to `names_max` platforms. A name without a session gives its place to a new one.
#[derive(Debug)]
pub struct Platforms {
    names_max: usize,
    gauges: IntGaugeVec,
    none: IntGauge,
    other: IntGauge,
    named: Mutex<Named>,
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
    gauge: IntGauge,
    sessions: u64,
}

/// Where a session is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Platform {
    /// Its device names none.
    None,
    /// With all that have no place.
    Other,
    /// At this place.
    Named(u16),
}

impl Platforms {
    /// Exports up to `names_max` platforms, and all others as one.
    pub fn new(gauges: IntGaugeVec, names_max: usize) -> Self {
        let [none, other] = [NONE, OTHER].map(|name| gauges.with_label_values(&[name]));
        Self { names_max, gauges, none, other, named: Mutex::default() }
    }

    /// Counts a session. [`Self::leave`] must follow.
    pub fn enter(&self, platform: &str) -> Platform {
        if platform.is_empty() {
            self.none.inc();
            return Platform::None;
        }
        let place = self.named.lock().enter(&label(platform), self.names_max, &self.gauges);
        place.map_or_else(
            || {
                self.other.inc();
                Platform::Other
            },
            Platform::Named,
        )
    }

    /// Ends a session's count.
    pub fn leave(&self, platform: Platform) {
        match platform {
            Platform::None => self.none.dec(),
            Platform::Other => self.other.dec(),
            Platform::Named(place) => self.named.lock().leave(place),
        }
    }
}

impl Named {
    fn enter(&mut self, name: &str, names_max: usize, gauges: &IntGaugeVec) -> Option<u16> {
        let index = match self.by_name.get(name) {
            Some(index) => *index,
            None => self.add(name, names_max, gauges)?,
        };
        let place = self.places.get_mut(usize::from(index))?;
        if place.sessions == 0 {
            self.free.retain(|free| *free != index);
        }
        place.sessions += 1;
        place.gauge.inc();
        Some(index)
    }

    /// Gives a name a place of its own, or that of a name without a session. Such a name is exported as 0 until then.
    fn add(&mut self, name: &str, names_max: usize, gauges: &IntGaugeVec) -> Option<u16> {
        if self.places.len() >= names_max && self.free.is_empty() {
            return None;
        }
        let gauge = || gauges.with_label_values(&[name]);
        let index = if self.places.len() < names_max {
            let index = u16::try_from(self.places.len()).ok()?;
            self.places.push(Place { name: name.to_owned(), gauge: gauge(), sessions: 0 });
            index
        } else {
            // The one that has been unused for longest.
            let index = self.free.remove(0);
            let place = self.places.get_mut(usize::from(index))?;
            let _ = gauges.remove_label_values(&[&place.name]);
            self.by_name.remove(&place.name);
            *place = Place { name: name.to_owned(), gauge: gauge(), sessions: 0 };
            index
        };
        self.by_name.insert(name.to_owned(), index);
        Some(index)
    }

    fn leave(&mut self, index: u16) {
        let Some(place) = self.places.get_mut(usize::from(index)) else { return };
        place.gauge.dec();
        place.sessions = place.sessions.saturating_sub(1);
        if place.sessions == 0 {
            self.free.push(index);
        }
    }
}

/// A name for a label: what a device writes may be any text, and the two labels that are not names are taken.
fn label(platform: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
    let name: String = platform.chars().map(plain).collect();
    if [NONE, OTHER].contains(&&*name) { format!("-{name}") } else { name }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus::Opts;

    fn platforms(names_max: usize) -> (Platforms, IntGaugeVec) {
        let gauges = IntGaugeVec::new(Opts::new("sessions", "Sessions."), &["platform"]).unwrap();
        (Platforms::new(gauges.clone(), names_max), gauges)
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
        assert_eq!([junk[2], ios], [Platform::Other; 2]);
        junk.into_iter().for_each(|session| platforms.leave(session));
        let again = platforms.enter("x2");
        let named = platforms.enter("ios");
        assert_ne!(named, Platform::Other, "x1 has no session");
        assert_eq!(platforms.enter("android"), Platform::Other, "two are in use");
        // One that was counted among the others still is.
        platforms.leave(ios);
        let expected = [("ios", 1.0), ("none", 0.0), ("other", 1.0), ("x2", 1.0)];
        assert_eq!(exported(), expected.map(|(name, count)| (name.to_owned(), count)));
        [again, named].into_iter().for_each(|session| platforms.leave(session));
        assert!(matches!(platforms.enter("android"), Platform::Named(_)));
    }
}
