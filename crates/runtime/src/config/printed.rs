//! A configuration as `--print-config` shows it.

use serde::Serialize;
use toml::{Table, Value};

use crate::secret_url::{masked, may_be_url};
use crate::words::{is_path, masked_address};

/// The keys with their values, as a table. Secrets have types that mask themselves; here also what may be a secret in
/// the wrong place is masked: user info and queries of URLs, and what is no path where a path belongs.
///
/// # Errors
/// The configuration is not a table.
pub fn printed<C: Serialize>(config: &C) -> Result<Table, String> {
    let mut table = Table::try_from(config).map_err(|error| error.to_string())?;
    mask_table(&mut table);
    Ok(table)
}

fn mask_table(table: &mut Table) {
    table.iter_mut().for_each(|(key, value)| mask(key, value));
}

fn mask(key: &str, value: &mut Value) {
    match value {
        Value::Table(table) => mask_table(table),
        Value::Array(items) => items.iter_mut().for_each(|item| mask(key, item)),
        Value::String(text) => {
            if names_file(key) && !text.is_empty() && !is_path(text) {
                *text = "***".to_owned();
            } else if names_address(key) {
                *text = masked_address(text);
            } else if may_be_url(text) {
                *text = masked(text);
            }
        }
        _ => {}
    }
}

/// Also librdkafka's `ssl.ca.location`.
fn names_file(key: &str) -> bool {
    key == "file" || key.ends_with("_file") || key.ends_with(".location")
}

/// A `host:port`, or a list of them.
fn names_address(key: &str) -> bool {
    matches!(key, "advertise" | "brokers")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hazard_150_what_may_be_a_secret_in_the_wrong_place_is_not_printed() {
        let printed = |text: &str| {
            let table: Table = text.parse().unwrap();
            super::printed(&table).unwrap().to_string().trim_end().to_owned()
        };
        for (written, shown) in [
            ("url = \"wss://me:hush@h/v1\"", "url = \"wss://me:***@h/v1\""),
            ("brokers = [\"me:hush@h:1\", \"h:2\"]", "brokers = [\"me:***@h:1\", \"h:2\"]"),
            ("advertise = \"me:hush\"", "advertise = \"me:***\""),
            ("secret_file = \"hush5ecret\"", "secret_file = \"***\""),
            ("file = \"https://h/hush\"", "file = \"***\""),
            ("\"ssl.ca.location\" = \"hush\"", "\"ssl.ca.location\" = \"***\""),
        ] {
            assert_eq!(printed(written), shown);
        }
        for same in [
            "key_file = \"/etc/barid/tls.key\"",
            "ready_file = \"\"",
            "issuer = [\"me@project.example.com\", \"https://issuer.example.com/\"]",
            "topic = \"barid.push\"",
        ] {
            assert_eq!(printed(same), same);
        }
        let tables = printed("[[keys]]\nsecret_file = \"hush\"\n");
        assert_eq!(tables, "[[keys]]\nsecret_file = \"***\"");
    }
}
