//! Checks of `kafka`, as thorough as they can be without a broker.

use std::path::Path;

use barid_runtime::words::{is_host_port, nearest, shown, shown_address, shown_path};
use barid_runtime::{bounds, files};
use rdkafka::ClientConfig;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::BaseConsumer;
use rdkafka::error::KafkaError;
use rdkafka::producer::BaseProducer;

use crate::config::{GroupProtocol, KafkaConfig, RESERVED, is_secret, own_name};
use crate::consumer::{self, Protocol};
use crate::producer;

/// Maximum length of a topic's name.
const TOPIC_BYTES_MAX: usize = 249;

/// The settings that are set most, for errors.
const USUAL: [&str; 16] = [
    "client.id",
    "compression.type",
    "linger.ms",
    "sasl.mechanism",
    "sasl.password",
    "sasl.username",
    "security.protocol",
    "session.timeout.ms",
    "socket.timeout.ms",
    "socket.keepalive.enable",
    "ssl.ca.location",
    "ssl.certificate.location",
    "ssl.endpoint.identification.algorithm",
    "ssl.key.location",
    "ssl.key.password",
    "statistics.interval.ms",
];

impl KafkaConfig {
    /// Checks bounds, names, properties and the files that they name. Where properties are set, librdkafka's clients
    /// are created as at start-up, but without brokers.
    ///
    /// # Errors
    /// Returns the invalid keys, one a line, each with the reason.
    pub fn check(&self) -> Result<(), String> {
        bounds::check_under("kafka.", self)?;
        let group = bounds::refuse_if(self.group.is_empty(), || {
            "kafka.group is empty; write the name of the purgers' consumer group".into()
        });
        bounds::all([self.check_brokers(), group, self.check_topics(), self.check_properties()])
    }

    fn check_brokers(&self) -> Result<(), String> {
        if self.brokers.is_empty() {
            return Err("kafka.brokers names no broker; write [\"HOST:PORT\", …]".into());
        }
        bounds::all(self.brokers.iter().enumerate().map(|(at, broker)| {
            bounds::refuse_if(!is_host_port(broker), || {
                format!("kafka.brokers[{at}]: {} is not HOST:PORT", shown_address(broker))
            })
        }))
    }

    fn check_topics(&self) -> Result<(), String> {
        let names = &self.topics;
        let all = [
            ("push_high", &names.push_high),
            ("push", &names.push),
            ("push_bulk", &names.push_bulk),
            ("receipts", &names.receipts),
            ("dead", &names.dead),
            ("revocations", &names.revocations),
        ];
        let checks = all.iter().enumerate().map(|(at, (key, name))| {
            check_topic(name).map_err(|problem| format!("kafka.topics.{key}: {problem}"))?;
            match all[..at].iter().find(|(_, other)| other == name) {
                Some((other, _)) => Err(format!(
                    "kafka.topics.{key}: {name:?} is also kafka.topics.{other}; write another name"
                )),
                None => Ok(()),
            }
        });
        bounds::all(checks)
    }

    /// Refuses properties that librdkafka does not know or this build does not support, files that are absent, and
    /// what cannot work together. Errors show no values of properties: they may be secrets.
    fn check_properties(&self) -> Result<(), String> {
        if self.properties.0.is_empty() {
            return Ok(());
        }
        let each = self.properties.0.iter().map(|(name, value)| {
            check_property(name, value)
                .map_err(|problem| format!("kafka.properties.{name:?} {problem}"))
        });
        bounds::all(each)?;
        self.check_sasl()?;
        let protocols: &[Protocol] = match self.group_protocol {
            GroupProtocol::Auto => &[Protocol::Range, Protocol::Classic],
            GroupProtocol::Consumer => &[Protocol::Range],
            GroupProtocol::Classic => &[Protocol::Classic],
        };
        self.create::<BaseProducer>(producer::settings(self))?;
        protocols.iter().try_for_each(|protocol| {
            self.create::<BaseConsumer>(consumer::settings(self, *protocol))
        })
    }

    /// Refuses settings of SASL that would not be used.
    fn check_sasl(&self) -> Result<(), String> {
        let properties = &self.properties.0;
        let is_on = properties
            .get("security.protocol")
            .is_some_and(|protocol| protocol.to_lowercase().starts_with("sasl_"));
        match properties.keys().find(|name| name.starts_with("sasl.")) {
            Some(name) if !is_on => Err(format!(
                "kafka.properties.{name:?} has no effect: set \"security.protocol\" = \"SASL_SSL\" \
                 or \"SASL_PLAINTEXT\""
            )),
            _ => Ok(()),
        }
    }

    /// Creates a client as at start-up, which connects to nothing.
    fn create<C: rdkafka::config::FromClientConfig>(
        &self,
        mut client: ClientConfig,
    ) -> Result<(), String> {
        client.remove("bootstrap.servers").set_log_level(RDKafkaLogLevel::Emerg);
        let Err(error) = client.create::<C>() else { return Ok(()) };
        let why = match error {
            KafkaError::ClientCreation(why) | KafkaError::ClientConfig(_, why, ..) => why,
            _ => "it is refused".to_owned(),
        };
        let secrets = self.properties.0.iter().filter(|(name, value)| {
            // Every string contains the empty one.
            is_secret(name) && !value.is_empty()
        });
        let why = secrets.fold(why, |why, (_, value)| why.replace(value, "…"));
        Err(format!("kafka.properties: {why}"))
    }
}

/// Checks the name of a topic.
///
/// # Errors
/// Returns why Kafka has no topic of this name, and what to write.
pub fn check_topic(name: &str) -> Result<(), String> {
    let is_legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let form = "write letters, digits, '.', '_' and '-', at most 249";
    match name {
        "" => Err(format!("is empty; {form}")),
        "." | ".." => Err(format!("{name:?} is not a name for a topic; {form}")),
        name if name.len() > TOPIC_BYTES_MAX || !name.chars().all(is_legal) => {
            Err(format!("{} is not a name for a topic; {form}", shown(name)))
        }
        _ => Ok(()),
    }
}

fn check_property(name: &str, value: &str) -> Result<(), String> {
    if RESERVED.contains(&own_name(name)) {
        return Err("must not be set: Barid sets it, or has a key for it".into());
    }
    let mut alone = ClientConfig::new();
    if let Err(error) = alone.set(name, value).create_native_config() {
        let why = match error {
            KafkaError::ClientConfig(_, why, ..) => why,
            _ => "it is refused".to_owned(),
        };
        let why = if value.is_empty() { why } else { why.replace(value, "…") };
        let meant = nearest(name, &USUAL).filter(|near| *near != name);
        let meant = meant.map(|near| format!("; did you mean {near:?}?"));
        return Err(format!("is refused: {why}{}", meant.unwrap_or_default()));
    }
    // `probe` is no path: OpenSSL then searches its default locations.
    if !(name.starts_with("ssl.") && name.ends_with(".location")) || value == "probe" {
        return Ok(());
    }
    let path = Path::new(value);
    // The authorities may be a directory. librdkafka would wait for a pipe.
    if name == "ssl.ca.location" && path.is_dir() {
        return Ok(());
    }
    files::check_regular(path).map_err(|error| format!("names {}: {error}", shown_path(path)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Properties;

    fn with(properties: &[(&str, &str)]) -> Result<(), String> {
        let owned = properties.iter().map(|(key, value)| ((*key).into(), (*value).into()));
        let properties = Properties(owned.collect());
        KafkaConfig { properties, ..Default::default() }.check()
    }

    #[test]
    fn hazard_60_properties_that_cannot_work_are_refused_by_name_and_show_no_value() {
        let with = |key: &str, value: &str| with(&[(key, value)]);
        assert_eq!(with("socket.nagle.disable", "true"), Ok(()));
        let told = with("sasl.pasword", "hunter2").unwrap_err();
        assert!(told.ends_with("did you mean \"sasl.password\"?"), "{told}");
        assert!(told.contains("sasl.pasword") && !told.contains("hunter2"), "{told}");
        let told = with("socket.timeout.ms", "hunter2").unwrap_err();
        assert!(told.contains("socket.timeout.ms") && !told.contains("hunter2"), "{told}");
        // An authority of one's own: its file is looked for.
        let authority = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
        let (there, absent) =
            (with("ssl.ca.location", authority), with("ssl.ca.location", "/nowhere/ca.pem"));
        let absent = absent.unwrap_err();
        assert_eq!(there, Ok(()));
        assert!(absent.contains("\"ssl.ca.location\" names /nowhere/ca.pem: No such"), "{absent}");
        let told = with("ssl.ca.location", "hunter2").unwrap_err();
        assert!(told.contains("names (a text of 7 bytes, not a path): No such"), "{told}");
        assert_eq!(with("ssl.ca.location", env!("CARGO_MANIFEST_DIR")), Ok(()));
        let told = with("ssl.key.location", "/dev/zero").unwrap_err();
        assert!(told.contains("names /dev/zero: it is a device"), "{told}");
    }

    #[test]
    fn an_error_about_an_empty_value_stays_readable() {
        let properties = [("socket.timeout.ms".to_owned(), String::new())].into();
        let config = KafkaConfig { properties: Properties(properties), ..Default::default() };
        let told = config.check().unwrap_err();
        assert!(told.contains("\"socket.timeout.ms\"") && !told.contains('…'), "{told}");
    }

    #[test]
    fn what_the_promises_rest_on_cannot_be_set() {
        let config: KafkaConfig = toml::from_str("properties = { acks = \"1\" }").unwrap();
        let told = config.check().unwrap_err();
        assert!(told.starts_with("kafka.properties.\"acks\" must not be set"), "{told}");
        let mut config = KafkaConfig::default();
        config.topics.dead = config.topics.push.clone();
        let told =
            "kafka.topics.dead: \"barid.push\" is also kafka.topics.push; write another name";
        assert_eq!(config.check().unwrap_err(), told);
    }

    #[test]
    fn hazard_112_names_and_brokers_that_kafka_would_refuse_are_refused_by_key() {
        let told = |change: fn(&mut KafkaConfig)| {
            let mut config = KafkaConfig::default();
            change(&mut config);
            config.check().map_or_else(|told| told, |()| String::new())
        };
        let form = "write letters, digits, '.', '_' and '-', at most 249";
        let empty = told(|config| config.topics.push = String::new());
        assert_eq!(empty, format!("kafka.topics.push: is empty; {form}"));
        let space = told(|config| config.topics.push = "a b".into());
        assert_eq!(space, format!("kafka.topics.push: \"a b\" is not a name for a topic; {form}"));
        let both = told(|config| {
            config.topics.dead = "..".into();
            config.topics.push = "x".repeat(250);
        });
        assert_eq!(both.lines().count(), 2, "{both}");
        assert_eq!(told(|config| config.topics.push = "a.b_C-9".into()), "");
        let broker = told(|config| config.brokers = vec!["a:1".into(), "b".into()]);
        assert_eq!(broker, "kafka.brokers[1]: \"b\" is not HOST:PORT");
        let broker = told(|config| config.brokers = vec!["me:hush@h:1".into(), "me:hush".into()]);
        assert!(!broker.contains("hush") && broker.lines().count() == 2, "{broker}");
        assert!(told(|config| config.brokers.clear()).starts_with("kafka.brokers names no broker"));
    }

    #[test]
    fn hazard_112_settings_that_librdkafka_refuses_together_are_refused_without_a_broker() {
        let sasl = [("security.protocol", "SASL_PLAINTEXT"), ("sasl.mechanism", "PLAIN")];
        let told = with(&sasl).unwrap_err();
        assert!(told.contains("sasl.username") && told.starts_with("kafka.properties"), "{told}");
        let whole = [sasl[0], sasl[1], ("sasl.username", "u"), ("sasl.password", "hunter2")];
        assert_eq!(with(&whole), Ok(()));
        let told = with(&whole[1..]).unwrap_err();
        assert!(told.contains("has no effect: set \"security.protocol\""), "{told}");
        assert!(!told.contains("hunter2"), "{told}");
        // Kerberos needs a library that this build is without.
        assert!(with(&sasl[..1]).unwrap_err().contains("GSSAPI"));
        let told = with(&[("session.timeout.ms", "1000"), ("heartbeat.interval.ms", "3000")]);
        assert!(told.unwrap_err().starts_with("kafka.properties: "));
        let told = with(&[("linger.ms", "1000000")]).unwrap_err();
        assert!(told.contains("linger.ms"), "{told}");
    }

    #[test]
    fn hazard_111_names_of_properties_need_no_quotes() {
        let text = "[properties]\nsasl.password = \"hunter2\"\n\"linger.ms\" = \"5\"";
        let config: KafkaConfig = toml::from_str(text).unwrap();
        assert_eq!(config.properties.0["sasl.password"], "hunter2");
        assert_eq!(config.properties.0["linger.ms"], "5");
    }
}
