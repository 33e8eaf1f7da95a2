//! Sessions by platform, as devices name theirs: a bounded set of names.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use prometheus::{IntGauge, IntGaugeVec};

/// Label of all platforms beyond the bound.
const OTHER: &str = "other";
/// Label of devices that name no platform.
const NONE: &str = "none";

/// The gauges of the platforms that were named first.
#[derive(Debug)]
pub struct Platforms {
    names_max: usize,
    gauges: IntGaugeVec,
    known: Mutex<HashMap<Arc<str>, IntGauge>>,
}

impl Platforms {
    /// Exports up to `names_max` platforms, and all others as one.
    pub fn new(gauges: IntGaugeVec, names_max: usize) -> Self {
        for name in [NONE, OTHER] {
            drop(gauges.with_label_values(&[name]));
        }
        Self { names_max, gauges, known: Mutex::default() }
    }

    /// The gauge of a platform, always the same one.
    pub fn gauge(&self, platform: &Arc<str>) -> IntGauge {
        if platform.is_empty() {
            return self.gauges.with_label_values(&[NONE]);
        }
        let mut known = self.known.lock();
        if let Some(gauge) = known.get(platform) {
            return gauge.clone();
        }
        if known.len() >= self.names_max {
            return self.gauges.with_label_values(&[OTHER]);
        }
        let gauge = self.gauges.with_label_values(&[&name(platform)]);
        known.insert(Arc::clone(platform), gauge.clone());
        gauge
    }
}

/// A name for a label: what a device writes may be any text.
fn name(platform: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
    platform.chars().map(plain).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus::Opts;

    #[test]
    fn the_first_platforms_have_names_and_the_rest_one_together() {
        let gauges = IntGaugeVec::new(Opts::new("sessions", "Sessions."), &["platform"]).unwrap();
        let platforms = Platforms::new(gauges.clone(), 2);
        for platform in ["ios", "a b\n", "third", "fourth", "ios", ""] {
            platforms.gauge(&Arc::from(platform)).inc();
        }
        platforms.gauge(&Arc::from("fourth")).dec();
        let of = |name: &str| gauges.with_label_values(&[name]).get();
        assert_eq!(["ios", "a-b-", "other", "none"].map(of), [2, 1, 1, 1]);
    }
}
