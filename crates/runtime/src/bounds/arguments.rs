//! For tests: walks every number of a command line.

use std::any::TypeId;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Arg, ArgAction, Command};

/// Passes values that are out of any range to each numeric option of `command` and of its subcommands; each
/// must be refused. Returns the names of the options.
///
/// # Panics
/// An option accepts such a value.
pub fn walk_arguments(command: &Command) -> Vec<String> {
    let mut command = command.clone();
    command.build();
    let mut found = Vec::new();
    walk(&command, &[], &command, &mut found);
    found
}

fn walk(root: &Command, path: &[&str], at: &Command, found: &mut Vec<String>) {
    for argument in at.get_arguments() {
        let Some(beyond) = beyond(argument) else { continue };
        let Some(long) = argument.get_long() else { continue };
        found.push(format!("{} --{long}", path.join(" ")));
        for value in beyond {
            let mut words = vec![root.get_name().to_owned()];
            words.extend(path.iter().map(|word| (*word).to_owned()));
            words.push(format!("--{long}={value}"));
            let refused = root.clone().try_get_matches_from(&words).map(drop).map_err(|e| e.kind());
            let ours = matches!(refused, Err(ErrorKind::ValueValidation | ErrorKind::InvalidValue));
            assert!(ours, "{words:?}: {refused:?}");
        }
    }
    for below in at.get_subcommands().filter(|below| below.get_name() != "help") {
        walk(root, &[path, &[below.get_name()]].concat(), below, found);
    }
}

/// Values that an option must refuse; `None` if it is not numeric.
fn beyond(argument: &Arg) -> Option<Vec<&'static str>> {
    if !matches!(argument.get_action(), ArgAction::Set | ArgAction::Append) {
        return None;
    }
    let kind = argument.get_value_parser().type_id();
    let is = |types: &[TypeId]| types.iter().any(|one| kind == *one);
    if is(&[TypeId::of::<u16>()]) {
        return Some(vec!["-1", "65536", "1e3", "NaN", ""]);
    }
    if is(&[TypeId::of::<Duration>()]) {
        return Some(vec![
            "-1s",
            "3661d",
            "9007199254740992",
            "18446744073709551615d",
            "1e9s",
            "NaN",
        ]);
    }
    let whole =
        [TypeId::of::<u8>(), TypeId::of::<u32>(), TypeId::of::<u64>(), TypeId::of::<usize>()];
    let mut beyond = vec!["-1", "9007199254740993", "18446744073709551615", "18446744073709551616"];
    if is(&whole) {
        beyond.extend(["1e3", "NaN", ""]);
        return Some(beyond);
    }
    is(&[TypeId::of::<f64>()]).then(|| [beyond, vec!["1e308", "inf", "NaN"]].concat())
}
