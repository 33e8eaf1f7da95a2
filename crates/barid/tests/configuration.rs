//! docs/configuration.md tells every number of configuration as the code has it.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use barid_runtime::Role;
use barid_runtime::bounds::Bounded as _;
use serde_json::Value;

const DOC: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/configuration.md");
/// Header of the table.
const TABLE: &str = "| key | roles | default | allowed |\n|---|---|---|---|\n";

/// Key, default, allowed; and the roles that have it so.
type Rows = BTreeMap<(String, String, String), Vec<&'static str>>;

fn add<R: Role>(rows: &mut Rows) {
    let defaults = serde_json::to_value(R::Config::default()).expect("data");
    for bound in R::Config::bounds() {
        let pointer = format!("/{}", bound.key.replace('.', "/"));
        let default = match defaults.pointer(&pointer) {
            Some(Value::Array(items)) => {
                items.iter().map(Value::to_string).collect::<Vec<_>>().join(", ")
            }
            Some(value) => value.to_string(),
            // Of a list of tables that is empty by default.
            None => "see below".to_owned(),
        };
        rows.entry((bound.key.clone(), default, bound.allowed())).or_default().push(R::NAME);
    }
}

#[test]
fn hazard_61_the_documentation_tells_the_bounds_of_every_number() {
    let mut rows = Rows::new();
    let all = [
        add::<barid_access::Access>,
        add::<barid_delayer::Delayer>,
        add::<barid_dispatcher::Dispatcher>,
        add::<barid_purger::Purger>,
    ];
    all.iter().for_each(|add| add(&mut rows));
    let mut table = TABLE.to_owned();
    for ((key, default, allowed), roles) in &rows {
        let roles = if roles.len() == all.len() { "all".to_owned() } else { roles.join(", ") };
        writeln!(table, "| `{key}` | {roles} | {default} | {allowed} |").expect("a string");
    }
    let doc = std::fs::read_to_string(DOC).expect("docs/configuration.md is there");
    let above = doc.split(TABLE).next().unwrap_or_default();
    let current = format!("{above}{table}");
    if std::env::var_os("BARID_WRITE_DOCS").is_some() {
        std::fs::write(DOC, current).expect("docs/configuration.md can be written");
    } else {
        assert_eq!(
            doc, current,
            "regenerate it: BARID_WRITE_DOCS=1 cargo test -p barid --test configuration"
        );
    }
}
