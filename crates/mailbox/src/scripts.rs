//! The scripts. Each is a file with its KEYS, ARGV and reply described at its top, behind the parts of the library that
//! it uses (`scripts/lib`).

use std::sync::LazyLock;

use barid_core::Shard;
use redis::Cmd;

/// A script, with its name in metrics and its SHA-1 in Redis.
pub(crate) struct Script {
    pub name: &'static str,
    code: &'static str,
    sha: LazyLock<String>,
}

/// Each part is the beginning of a function that contains the rest. At a tail call the locals of the part before leave
/// the stack, and closures copy references to them from the enclosing function. As locals of one function, each
/// closure would search the stack for each of them, at every call of the script: that took a seventh of an accept of
/// one message.
macro_rules! script {
    ($static:ident, $name:literal, $flags:literal, [$($part:literal),*]) => {
        pub(crate) static $static: Script = Script {
            name: $name,
            code: concat!(
                "#!lua",
                $flags,
                "\n",
                $(include_str!(concat!("scripts/lib/", $part, ".lua")), "return (function()\n",)*
                include_str!(concat!("scripts/", $name, ".lua")),
                $(script!(@end_of $part),)*
            ),
            sha: LazyLock::new(|| redis::Script::new($static.code).get_hash().to_owned()),
        };
    };
    (@end_of $part:literal) => {
        "end)()\n"
    };
}

script!(ACCEPT, "accept", "", ["base", "mailbox", "append"]);
script!(CONNECT, "connect", "", ["base", "mailbox"]);
// The same, for users that Redis holds already.
script!(CONNECT_KNOWN, "connect", " flags=allow-oom", ["base", "mailbox"]);
script!(CONFIRM, "confirm", " flags=allow-oom", ["base", "mailbox"]);
script!(READ, "read", " flags=no-writes", ["base", "mailbox"]);
script!(ACK, "ack", " flags=allow-oom", ["base", "mailbox"]);
script!(DISCONNECT, "disconnect", " flags=allow-oom", ["base", "mailbox"]);
script!(JOIN, "join", " flags=allow-oom", ["base", "mailbox"]);
script!(JOURNAL, "journal", " flags=no-writes", ["base"]);
script!(FIRE, "fire", " flags=allow-oom", ["base", "mailbox"]);
script!(DEFER, "defer", " flags=allow-oom", ["base", "mailbox"]);
script!(DUE, "due", " flags=no-writes", ["base"]);
script!(LEASE, "lease", " flags=allow-oom", ["base"]);
script!(COPY, "copy", " flags=allow-oom", ["base"]);
script!(COPIES, "copies", " flags=no-writes", ["base"]);

/// Scripts with metrics; those of leases are not on a message's path.
pub(crate) static TIMED: [&Script; 11] =
    [&ACCEPT, &CONNECT, &CONFIRM, &READ, &ACK, &DISCONNECT, &JOIN, &JOURNAL, &DUE, &FIRE, &DEFER];

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

/// Keys and arguments of a script call, in the order in which they are added.
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

    /// Adds a key that all items of a shard share, once; a call has one kind of shared key. Shared keys follow the
    /// items' own. Returns its number among them, from 1.
    pub fn shared_key(&mut self, shard: Shard, key: fn(Shard) -> String) -> u16 {
        let known = self.shared_keys.iter().position(|(of, _)| *of == shard);
        let index = known.unwrap_or_else(|| {
            self.shared_keys.push((shard, key(shard)));
            self.shared_keys.len() - 1
        });
        u16::try_from(index + 1).unwrap_or(u16::MAX)
    }

    /// Adds an argument, text or a number.
    pub fn arg(&mut self, arg: impl ToString) -> &mut Self {
        self.args.push(Arg::Text(arg.to_string()));
        self
    }

    /// Adds an argument of any bytes.
    pub fn bytes(&mut self, arg: bytes::Bytes) -> &mut Self {
        self.args.push(Arg::Bytes(arg));
        self
    }
}
