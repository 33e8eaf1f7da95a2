//! The commands. Each has its options in a file of its own.

use clap::{Parser, Subcommand};

use crate::{
    authority, dead, dev, inspect, kick, listen, receipts, revoke, send, token, top, topics,
};

/// Barid, a push cluster: delivers messages from Kafka to devices, in order and once, and keeps them for devices
/// that are offline.
#[derive(Debug, Parser)]
#[command(
    version,
    disable_help_subcommand = true,
    after_help = format!(
        "While `barid dev` is running, the other commands use its cluster. For another cluster, set\n\
         BARID_BROKERS, BARID_ADMIN, BARID_REDIS, BARID_URL, BARID_TOKEN and BARID_SECRET_FILE,\n\
         or give the options of the same names.\n\n{}",
        barid_runtime::exit::help(|row| row.2)
    )
)]
pub struct Cli {
    /// Print JSON, one object per line
    #[arg(long, global = true)]
    pub json: bool,
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a whole cluster in this process, and a demonstration
    Dev(dev::Args),
    /// Send a message to a user, several users, or one device, through Kafka
    Send(send::Args),
    /// Connect as a device, print its messages and acknowledge them
    Listen(listen::Args),
    /// Create a token for a device, or check one
    Token(token::Args),
    /// Show the live state of a cluster: rates, latencies, lags, nodes, problems
    Top(top::Args),
    /// Close the sessions of a device, a user, an app, or everyone
    Kick(kick::Args),
    /// Revoke tokens of devices: of a user, a token's id, a key, an app, or everyone
    #[command(subcommand)]
    Revoke(revoke::Action),
    /// Show stored state
    #[command(subcommand)]
    Inspect(Inspect),
    /// Set up a cluster
    #[command(subcommand)]
    Cluster(Cluster),
    /// Create or check the topics in Kafka
    #[command(subcommand)]
    Topics(Topics),
}

/// The actions of `barid topics`.
#[derive(Debug, Subcommand)]
pub enum Topics {
    /// Create the topics that are missing, then check all of them. Existing ones are not changed
    Create(topics::CreateArgs),
    /// Check that the topics exist, and that their settings fit
    Check(topics::Args),
}

/// The actions of `barid cluster`.
#[derive(Debug, Subcommand)]
pub enum Cluster {
    /// Create a certificate authority for mutual TLS between the roles, and issue their certificates
    Ca(authority::Args),
}

/// The targets of `barid inspect`.
#[derive(Debug, Subcommand)]
pub enum Inspect {
    /// Show a user's mailbox, devices, routes and retry timer
    User(inspect::Args),
    /// Show a group's mailbox, and the access nodes with members; everyone: that of all devices
    Group(inspect::GroupArgs),
    /// Show the newest dead letters: refused records, with the reason
    Dead(dead::Args),
    /// Show the newest receipts, or follow them
    Receipts(receipts::Args),
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    fn parse(line: &str) -> Result<Command, String> {
        let words = std::iter::once("barid").chain(line.split_whitespace());
        Cli::try_parse_from(words).map(|cli| cli.command).map_err(|error| error.to_string())
    }

    #[test]
    fn the_definitions_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn hazard_61_every_number_of_the_command_line_is_bounded() {
        let numbers = barid_runtime::bounds::walk_arguments(&Cli::command());
        for number in [
            "cluster ca --days",
            "topics create --partitions",
            "kick --rate",
            "listen --count",
            "listen --for",
            "send --ttl",
            "token --ttl",
        ] {
            assert!(numbers.iter().any(|found| found == number), "{number} of {numbers:?}");
        }
    }

    #[test]
    fn a_message_has_one_audience_and_one_body() {
        assert!(parse("send --user alice hello").is_ok());
        assert!(parse("send --users alice,bob --json-body {}").is_ok());
        let error = parse("send hello").unwrap_err();
        assert!(error.contains("--user <USER>"), "{error}");
        let error = parse("send --user alice").unwrap_err();
        assert!(error.contains("--text <TEXT>") || error.contains("[TEXT]"), "{error}");
        assert!(parse("send --user a --users b,c hello").is_err());
        assert!(parse("send --group eng hello").is_ok() && parse("send --everyone hello").is_ok());
        assert!(parse("send --group eng --everyone hello").is_err());
        assert!(parse("send --user a --group eng hello").is_err());
        for many in ["--users b,c", "--group eng", "--everyone"] {
            assert!(parse(&format!("send {many} --device d hello")).is_err(), "{many}");
        }
        assert!(parse("send --user a hello --file x").is_err());
    }

    #[test]
    fn a_kick_says_whom_and_means_it() {
        assert!(parse("kick --user alice").is_ok());
        assert!(parse("kick --user alice --device phone --app shop --reason fraud").is_ok());
        assert!(parse("kick --whole-app shop --rate 50").is_ok());
        assert!(parse("kick --everyone --yes").is_ok());
        for bad in [
            "kick",
            "kick --app shop",
            "kick --device phone",
            "kick --everyone --user alice",
            "kick --everyone --app shop",
            "kick --whole-app shop --device phone",
            "kick --everyone --rate 0",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_token_is_made_or_checked() {
        let Command::Token(args) = parse("token check abc --config a.toml").unwrap() else {
            panic!("a token")
        };
        assert!(args.action.is_some() && args.user.is_none());
        assert!(parse("token check").is_ok() && parse("token --user alice").is_ok());
        assert!(parse("token").unwrap_err().contains("--user"));
        for bad in ["token --user alice check abc", "token check abc --config a --secret b"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_revocation_names_what_it_revokes() {
        for good in [
            "revoke user alice --app shop --issued-before 2026-12-01T09:00:00Z --for 1h",
            "revoke token a:b --reason stolen",
            "revoke key 2026-11",
            "revoke app shop",
            "revoke everyone --yes",
            "revoke list",
            "revoke withdraw user alice",
            "revoke withdraw everyone",
            "revoke withdraw ended",
            "revoke withdraw record flock:7",
            "revoke token -x7 --for 1h",
            "revoke user alice --margin 30s",
            "revoke user --app shop alice",
        ] {
            assert!(parse(good).is_ok(), "{good}: {:?}", parse(good).err());
        }
        for bad in [
            "revoke",
            "revoke user",
            "revoke everyone alice",
            "revoke key k --issued-before 1760000000",
            "revoke user alice --issued-before soon",
            "revoke user alice --issued-before 5 --margin 1s",
            "revoke user alice --for 0s",
            "revoke app a:b",
            "revoke withdraw",
            "revoke withdraw user",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn hazard_115_a_time_that_is_over_at_once_is_refused() {
        for line in
            ["token --user a --ttl 0s", "send --user a x --ttl 0s", "listen --user a --for 0"]
        {
            assert!(parse(line).unwrap_err().contains("longer than 0"), "{line}");
        }
        assert!(parse("dev --log bogus").unwrap_err().contains("bogus"));
    }

    #[test]
    fn durations_have_units() {
        assert!(parse("token --user alice --ttl 90m").is_ok());
        let error = parse("token --user alice --ttl soon").unwrap_err();
        assert!(error.contains("30s, 15m, 1h, 7d"), "{error}");
    }

    #[test]
    fn names_are_checked_before_anything_happens() {
        let error = parse("send --app a:b --user alice hello").unwrap_err();
        assert!(error.contains("app contains ':'"), "{error}");
    }
}
