use super::*;
use std::io::Write as _;

#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Config {
    name: String,
    admin: AdminConfig,
    brokers: Vec<String>,
    limit: u32,
    flag: bool,
    format: Option<LogFormat>,
    table: Inner,
    number: Option<u32>,
    weights: [u32; 3],
}

#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Inner {
    a: u32,
}

impl Bounded for Config {
    fn bounds() -> Vec<Bound> {
        [
            vec![whole("limit", 0..=9, ""), whole("number", 1..=5, "")],
            crate::bounds::within::<AdminConfig>("admin"),
        ]
        .concat()
    }
}

fn with(file: &str, variables: &[(&str, &str)]) -> Result<Config, String> {
    let mut path = tempfile::NamedTempFile::new().unwrap();
    path.write_all(file.as_bytes()).unwrap();
    let variables = variables.iter().map(|(k, v)| ((*k).into(), (*v).into()));
    let loaded = load(Some(path.path()), "BARID_X_", variables);
    let name = path.path().display().to_string();
    loaded.map(|loaded| loaded.config).map_err(|e| e.to_string().replace(&name, "FILE"))
}

#[test]
fn environment_overrides_the_file() {
    let config = with(
        "limit = 1\nname = 'file'",
        &[
            ("BARID_X_LIMIT", "7"),
            ("BARID_X_NAME", "12"),
            ("BARID_X_BROKERS", "['a:1', 'b:2']"),
            ("BARID_X_ADMIN__LISTEN", "127.0.0.1:9"),
            ("BARID_Y_LIMIT", "8"),
        ],
    )
    .unwrap();
    assert_eq!((config.limit, config.name.as_str()), (7, "12"));
    assert_eq!(config.brokers, ["a:1", "b:2"]);
    assert_eq!(config.admin.listen.port(), 9);
}

#[test]
fn hazard_54_what_kubernetes_sets_for_a_service_is_passed_over() {
    // Services named barid-x, barid-x-grpc and barid-x--odd, with a named port and IPv6.
    let variables = [
        ("BARID_X_SERVICE_HOST", "10.96.0.7"),
        ("BARID_X_SERVICE_PORT", "7080"),
        ("BARID_X_SERVICE_PORT_WS", "7080"),
        ("BARID_X_PORT", "tcp://10.96.0.7:7080"),
        ("BARID_X_PORT_7080_TCP", "tcp://10.96.0.7:7080"),
        ("BARID_X_PORT_7080_TCP_PROTO", "tcp"),
        ("BARID_X_PORT_7080_TCP_PORT", "7080"),
        ("BARID_X_PORT_7080_TCP_ADDR", "10.96.0.7"),
        ("BARID_X_GRPC_SERVICE_HOST", "fd00::7"),
        ("BARID_X_GRPC_SERVICE_PORT", "7081"),
        ("BARID_X_GRPC_SERVICE_PORT_HTTP_2", "7081"),
        ("BARID_X_GRPC_PORT", "tcp://[fd00::7]:7081"),
        ("BARID_X_GRPC_PORT_7081_UDP", "udp://[fd00::7]:7081"),
        ("BARID_X_GRPC_PORT_7081_SCTP_PROTO", "sctp"),
        ("BARID_X_GRPC_PORT_7081_TCP_PORT", "7081"),
        ("BARID_X_GRPC_PORT_7081_TCP_ADDR", "fd00::7"),
        ("BARID_X__ODD_SERVICE_HOST", "10.96.0.7"),
        ("BARID_X__ODD_PORT", "tcp://10.96.0.7:7080"),
    ];
    assert_eq!(with("", &variables).unwrap(), Config::default());
}

#[test]
fn hazard_54_what_is_surely_a_typo_is_an_error_still() {
    for (variable, value) in [
        ("BARID_X_PORT", "7080"),
        ("BARID_X_PORT", "0.0.0.0:7080"),
        ("BARID_X_PORT", "http://10.96.0.7:7080"),
        ("BARID_X_ADMIN_PORT", "7102"),
        ("BARID_X_SERVICE_HOST", "here"),
        ("BARID_X_SERVICE_PORT", "many"),
        ("BARID_X_SERVICE", "10.96.0.7"),
        ("BARID_X_PORT_7080_TCP", "7080"),
        ("BARID_X_PORT_TCP", "tcp://10.96.0.7:7080"),
        ("BARID_X_ADMIN__PORT", "7102"),
    ] {
        let error = with("", &[(variable, value)]).unwrap_err();
        assert!(error.ends_with(&format!("(set by {variable})")), "{variable}={value}: {error}");
    }
}

#[test]
fn hazard_54_variables_that_are_no_text_end_nothing_unless_they_are_ours() {
    use std::os::unix::ffi::OsStringExt as _;
    let bytes = || OsString::from_vec(vec![0xff]);
    let load = |name: OsString| {
        load::<Config>(None, "BARID_X_", [(name, bytes())].into_iter())
            .map(|loaded| loaded.config)
            .map_err(|e| e.to_string())
    };
    assert_eq!(load(bytes()).unwrap(), Config::default());
    assert_eq!(load("BARID_Y_NAME".into()).unwrap(), Config::default());
    assert_eq!(load("BARID_X_NAME".into()).unwrap_err(), "BARID_X_NAME: its value is not UTF-8");
}

#[test]
fn unknown_keys_are_refused_by_name() {
    let error = with("[admin]\nlisen = 'x'", &[]).unwrap_err();
    let told = "admin.lisen: unknown key; did you mean \"admin.listen\"? (set in FILE, line 2)";
    assert_eq!(error, told);
    let error = with("", &[("BARID_X_LIMITT", "7")]).unwrap_err();
    let told = "limitt: unknown key; did you mean BARID_X_LIMIT? (set by BARID_X_LIMITT)";
    assert_eq!(error, told);
}

#[test]
fn hazard_74_no_error_repeats_the_value_of_a_key() {
    let refused = |file: &str, variables: &[(&str, &str)]| {
        let error = with(file, variables).unwrap_err();
        assert!(!error.contains("12345") && !error.contains("hunter2"), "{error}");
        error
    };
    for wrong in ["12345", "-12345", "12345.5", "[12345]", "{ v = 12345 }", "true"] {
        let told = refused(&format!("name = {wrong}"), &[]);
        assert!(told.starts_with("name: ") && told.contains(", not text; write it"), "{told}");
    }
    // Nested wrongly: a text or a list where a table belongs, a table where a text does.
    for file in [
        "admin = \"hunter2\"",
        "admin = [\"hunter2\"]",
        "admin = 12345",
        "brokers = \"hunter2, expected 12345, expected x\"",
        "brokers = [[\"hunter2\"]]",
        "brokers = [12345]",
        "name = { a = \"hunter2\" }",
        "name.a.b = \"hunter2\"",
        "admin.name = \"hunter2\"",
        "limit = { a = \"hunter2\" }",
        "limit = \"hunter2\"",
        "number = \"12345hunter2\"",
        "weights = [\"hunter2\"]",
        "flag = \"hunter2\"",
        "format = \"hunter2\"",
        "admin.listen = \"me:hunter2\"",
        "admin.listen = \"me:hunter2@h:1\"",
    ] {
        refused(file, &[]);
    }
    let told = refused("", &[("BARID_X_ADMIN", "hunter2")]);
    let form = "write its name in brackets, and its keys below (set by BARID_X_ADMIN)";
    assert_eq!(told, format!("admin: text, not a table; {form}"));
    refused("", &[("BARID_X_NAME__A", "hunter2")]);
    refused("name = \"hunter2\"", &[("BARID_X_NAME__A", "hunter2")]);
    refused("", &[("BARID_X_BROKERS", "[\"hunter2\"")]);
    // Not TOML: the line is not shown.
    for line in [
        "name = hunter2",
        "name = \"hunter2",
        "name = 'hunter2\"",
        "name = \"hunter2\" 12345",
        "name = \"\\hunter2\"",
        "name = 12345hunter2",
        "name: hunter2",
        "name = \"a\"\nname = \"hunter2\"",
        "name = \"\"\"hunter2",
        "brokers = [\"hunter2\"",
        "admin = { a = \"hunter2\"",
        "name = 123450000000000000000000",
    ] {
        let told = refused(&format!("limit = 1\n{line}"), &[]);
        assert!(told.contains(": line "), "{told}");
    }
    let told = refused("limit = 1\n  name = hunter2", &[]);
    assert!(told.contains(": line 2, column 10: "), "{told}");
}

#[test]
fn values_that_do_not_fit_name_their_key() {
    let error = with("name = 1", &[]).unwrap_err();
    assert_eq!(error, "name: a number, not text; write it in quotes (set in FILE, line 1)");
    let error = with("limit = '7 apples'", &[]).unwrap_err();
    let told = "limit: a text of 8 bytes, not a number; write 0 to 9 (set in FILE, line 1)";
    assert_eq!(error, told);
    for (file, variable) in [("limit = '7'", "1"), ("", "'7'")] {
        let variables = [("BARID_X_LIMIT", variable)];
        let error = with(file, if file.is_empty() { &variables } else { &[] }).unwrap_err();
        let told = "limit: \"7\" is text, not a number; write 0 to 9 without quotes";
        assert!(error.starts_with(told), "{error}");
    }
    let error = with("", &[("BARID_X_LIMIT", "18446744073709551616")]).unwrap_err();
    assert_eq!(
        error,
        "limit: 18446744073709551616 is out of range; write 0 to 9 (set by BARID_X_LIMIT)"
    );
    let error = with("limit = 1", &[("BARID_X_LIMIT__DEEP", "1")]).unwrap_err();
    assert_eq!(error, "BARID_X_LIMIT__DEEP: limit is not a table");
}

#[test]
fn hazard_110_an_error_names_value_form_and_line_of_all_wrong_keys_at_once() {
    let told = with("limit = 18446744073709551615\nname = 'n'", &[]);
    let range = "limit: 18446744073709551615 is out of range; write 0 to 9";
    assert_eq!(told.unwrap_err(), format!("{range} (set in FILE, line 1)"));
    let told = with(
        "limit = 10\nname = 'n'\nbrokers = 'a:1'\nflagg = true\nflag = 'yes'\n\
         format = 'jsom'\n[admin]\nlisten = ':7080'\nblocked_after_seconds = 'x'\n\n[[table]]\na = 1",
        &[("BARID_X_NUMBER", ""), ("BARID_X_ADMIN_LISTEN", "h:1"), ("BARID_X_FLOG", "true")],
    );
    let lines = [
        "limit: 10 is out of range; write 0 to 9 (set in FILE, line 1)",
        "brokers: text, not a list; write [\"…\", \"…\"] (set in FILE, line 3)",
        "flagg: unknown key; did you mean \"flag\"? (set in FILE, line 4)",
        "flag: \"yes\" is text, not true or false; write true or false without quotes (set in \
         FILE, line 5)",
        "format: \"jsom\" is not one of \"text\", \"json\"; did you mean \"json\"? (set in FILE, \
         line 6)",
        "admin.listen: \":7080\" names no host; write \"127.0.0.1:7080\", or \"0.0.0.0:7080\" for \
         all interfaces (set in FILE, line 8)",
        "admin.blocked_after_seconds: a text of 1 byte, not a number; write 1 to 86400 s (set in FILE, \
         line 9)",
        "table: a list of tables, not a table; write its name in single brackets (set in FILE, \
         line 11)",
        "admin_listen: unknown key; did you mean BARID_X_ADMIN__LISTEN? (set by \
         BARID_X_ADMIN_LISTEN)",
        "flog: unknown key; did you mean BARID_X_FLAG? (set by BARID_X_FLOG)",
        "number: is empty; write 1 to 5, or leave it out (set by BARID_X_NUMBER)",
    ];
    assert_eq!(told.unwrap_err().lines().collect::<Vec<_>>(), lines);
}

#[test]
fn hazard_110_lists_may_be_set_with_commas_by_the_environment() {
    let brokers = |text: &str| with("", &[("BARID_X_BROKERS", text)]).map(|config| config.brokers);
    assert_eq!(brokers("a:1").unwrap(), ["a:1"]);
    assert_eq!(brokers("a:1, b:2").unwrap(), ["a:1", "b:2"]);
    assert_eq!(brokers("['a:1,b', 'c']").unwrap(), ["a:1,b", "c"]);
    assert!(brokers("").unwrap().is_empty());
    let weights = |text: &str| with("", &[("BARID_X_WEIGHTS", text)]).map(|config| config.weights);
    assert_eq!(weights("8,4,1").unwrap(), [8, 4, 1]);
    assert_eq!(weights("[8, 4, 1]").unwrap(), [8, 4, 1]);
    assert!(weights("8,4").unwrap_err().contains("set by BARID_X_WEIGHTS"));
}

#[test]
fn hazard_111_names_with_dots_are_written_with_underscores_by_the_environment() {
    let defaults = Table::new();
    let variables = [
        ("BARID_X_KAFKA__PROPERTIES__SASL_PASSWORD", "12345"),
        ("BARID_X_KAFKA__PROPERTIES__SASL.USERNAME", "true"),
        ("BARID_X_KAFKA__GROUP_ID", "g"),
    ];
    let variables = variables.iter().map(|(k, v)| ((*k).into(), (*v).into()));
    let (found, problems) = environment::read("BARID_X_", &defaults, variables);
    let found: Vec<_> = found.iter().map(|v| (v.path[1..].join("/"), v.value.as_str())).collect();
    assert!(problems.is_empty());
    assert_eq!(found[0], ("properties/sasl.password".into(), Some("12345")));
    assert_eq!(found[1], ("properties/sasl.username".into(), Some("true")));
    assert_eq!(found[2], ("group_id".into(), Some("g")));
}

#[test]
fn hazard_110_a_variable_with_a_mistyped_prefix_is_named() {
    let meant = |name: &str, value: &str| {
        misspelt([(name.into(), value.into())].into_iter()).pop().map(|(_, meant)| meant)
    };
    for (name, good) in [
        ("BARID_ACESS_LISTEN", "BARID_ACCESS_LISTEN"),
        ("BARD_PURGER_LOG__LEVEL", "BARID_PURGER_LOG__LEVEL"),
        ("BARID_DISPATCH_LISTEN", "BARID_DISPATCHER_LISTEN"),
        ("barid_delayer_poll_ms", "BARID_DELAYER_POLL_MS"),
        ("BARID_ACCESS_LISTEN", ""),
        ("BARID_PURGER_X", ""),
        ("BARID_ADMIN", ""),
        ("BARID_SECRET_FILE", ""),
        ("GRID_ACCESS_TOKEN", ""),
        ("BARID_ACCESS2_PORT_7080_TCP_PROTO", ""),
    ] {
        let value = if name.ends_with("PROTO") { "tcp" } else { "x" };
        assert_eq!(meant(name, value).unwrap_or_default(), good, "{name}");
    }
}

fn checked(file: &str, check: impl Fn(&Config) -> Result<(), String>) -> Vec<String> {
    let mut path = tempfile::NamedTempFile::new().unwrap();
    path.write_all(file.as_bytes()).unwrap();
    let loaded = load_checked(Some(path.path()), "BARID_X_", std::iter::empty(), check);
    let name = path.path().display().to_string();
    let problems = loaded.map_or_else(|problems| problems, |_| String::new());
    problems.replace(&name, "FILE").lines().map(str::to_owned).collect()
}

#[test]
fn hazard_138_what_a_check_refuses_is_told_beside_what_cannot_be_read() {
    let check = |config: &Config| {
        let brokers = config.brokers.iter().any(|broker| broker.contains("://"));
        let told = [
            brokers.then(|| "brokers[0]: write HOST:PORT".to_owned()),
            // Seen with the defaults of what was refused, and of what was never set.
            Some(format!("name must be longer than limit ({})", config.limit)),
            Some("table.a must be set".to_owned()),
        ];
        Err(told.into_iter().flatten().collect::<Vec<_>>().join("\n"))
    };
    let told = checked("limit = 10\nname = 'n'\nbrokers = ['kafka://a:1']", check);
    let wanted = [
        "limit: 10 is out of range; write 0 to 9 (set in FILE, line 1)",
        "brokers[0]: write HOST:PORT (set in FILE, line 3)",
    ];
    assert_eq!(told, wanted);
    let told = checked("limit = 9\nname = 'n'", check);
    assert_eq!(told.len(), 2, "nothing was refused: all is told: {told:?}");
    assert!(told[0].ends_with("limit (9) (set in FILE, line 2)"), "{told:?}");
}

#[test]
fn hazard_138_a_hint_names_the_keys_own_port_and_the_line_its_key() {
    let told = |file: &str| with(file, &[]).unwrap_err();
    let at = told("[admin]\nlisten = 'localhost'");
    assert!(at.contains("write \"127.0.0.1:0\", or \"0.0.0.0:0\" for all"), "{at}");
    let at = told("limit = 20 s");
    assert!(at.starts_with("FILE: line 1, column "), "{at}");
    assert!(at.contains(": limit: the value is neither a number nor in quotes; write"), "{at}");
    let at = told("limit = 1\nname = 'a'\nlimit = 2");
    assert!(at.contains("line 3, column 1: limit: duplicate key"), "{at}");
    // The line may hold a secret in place of a key.
    let at = told("hunter2");
    assert!(!at.contains("hunter2"), "{at}");
}

#[test]
fn hazard_138_variables_without_a_role_are_named() {
    let known = ["redis.url".to_owned(), "drain_seconds".to_owned()];
    let told = |name: &str| {
        let all = std::iter::once((name.into(), "x".into()));
        without_role("BARID_PURGER_", &known, all).into_iter().map(|(_, meant)| meant).next()
    };
    let meant = Some("BARID_PURGER_REDIS__URL".to_owned());
    assert_eq!((told("BARID_REDIS__URL"), told("barid_redis__url")), (meant.clone(), meant));
    // Of the command `barid`, of another role, and of a Service.
    for other in ["BARID_REDIS", "BARID_ACCESS_REDIS__URL", "BARID_REDIS_SERVICE_HOST"] {
        assert_eq!(told(other), None, "{other}");
    }
}
