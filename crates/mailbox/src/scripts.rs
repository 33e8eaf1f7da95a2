//! The scripts, each a file with its KEYS, ARGV and reply described on top.

use std::sync::LazyLock;

use barid_core::Shard;
use redis::Cmd;

/// A script and the name under which Redis remembers it.
pub(crate) struct Script {
    /// As in the file's name and in metrics.
    pub name: &'static str,
    code: &'static str,
    sha: LazyLock<String>,
}

macro_rules! script {
    ($static:ident, $name:literal, $flags:literal) => {
        pub(crate) static $static: Script = Script {
            name: $name,
    code: script!(@code $name, $flags),
            sha: LazyLock::new(|| {
        redis::Script::new(script!(@code $name, $flags)).get_hash().to_owned()
            }),
        };
    };
    (@code $name:literal, $flags:literal) => {
        concat!(
            "#!lua",
            $flags,
            "\n",
            include_str!("scripts/lib.lua"),
            include_str!(concat!("scripts/", $name, ".lua"))
        )
    };
}

script!(ACCEPT, "accept", "");
script!(CONNECT, "connect", " flags=allow-oom");
script!(CONFIRM, "confirm", " flags=allow-oom");
script!(READ, "read", " flags=no-writes");
script!(ACK, "ack", " flags=allow-oom");
script!(DISCONNECT, "disconnect", " flags=allow-oom");
script!(DUE, "due", " flags=no-writes");
script!(FIRE, "fire", " flags=allow-oom");
script!(DEFER, "defer", " flags=allow-oom");
script!(LEASE, "lease", " flags=allow-oom");
script!(COPY, "copy", " flags=allow-oom");
script!(COPIES, "copies", " flags=no-writes");

/// The scripts that calls are timed and counted of; leases and their copies are not on a message's way.
pub(crate) static TIMED: [&Script; 9] =
    [&ACCEPT, &CONNECT, &CONFIRM, &READ, &ACK, &DISCONNECT, &DUE, &FIRE, &DEFER];

impl Script {
    /// `EVALSHA` with these keys and arguments.
    pub fn command(&self, call: &Call) -> Cmd {
        let mut cmd = redis::cmd("EVALSHA");
        cmd.arg(self.sha.as_str()).arg(call.keys.len() + call.shared_keys.len());
        for key in call.keys.iter().chain(call.shared_keys.iter().map(|(_, key)| key)) {
            cmd.arg(key);
        }
        for arg in &call.args {
            cmd.arg(arg.bytes());
        }
        cmd
    }

    /// `SCRIPT LOAD`.
    pub fn load(&self) -> Cmd {
        let mut cmd = redis::cmd("SCRIPT");
        cmd.arg("LOAD").arg(self.code);
        cmd
    }
}

/// Keys and arguments of a script call.
#[derive(Default)]
pub(crate) struct Call {
    keys: Vec<String>,
    shared_keys: Vec<(Shard, String)>,
    args: Vec<Arg>,
}

enum Arg {
    Text(String),
    Bytes(bytes::Bytes),
}

impl Arg {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Text(text) => text.as_bytes(),
            Self::Bytes(bytes) => bytes,
        }
    }
}

impl Call {
    pub fn key(&mut self, key: String) -> &mut Self {
        self.keys.push(key);
        self
    }

    /// A key that the items of a shard have in common; one kind of key a call. They stand behind the
    /// items' own; returns which of them it is, from 1.
    pub fn shared_key(&mut self, shard: Shard, key: fn(Shard) -> String) -> u16 {
        let known = self.shared_keys.iter().position(|(of, _)| *of == shard);
        let index = known.unwrap_or_else(|| {
            self.shared_keys.push((shard, key(shard)));
            self.shared_keys.len() - 1
        });
        u16::try_from(index + 1).unwrap_or(u16::MAX)
    }

    /// An argument: text or a number.
    pub fn arg(&mut self, arg: impl ToString) -> &mut Self {
        self.args.push(Arg::Text(arg.to_string()));
        self
    }

    /// An argument of any bytes.
    pub fn bytes(&mut self, arg: bytes::Bytes) -> &mut Self {
        self.args.push(Arg::Bytes(arg));
        self
    }
}
