//! The floor: the barest scripts.

use anyhow::{Result, ensure};
use barid_core::IdHash;
use barid_mailbox::{RedisConfig, UserKey};
use barid_wire::envelope::Header;
use redis::aio::MultiplexedConnection;

use crate::barid::{source, user_key};
use crate::workload::{Acked, Case, Message, Side};

const ACCEPT: &str = include_str!("floor_accept.lua");
const ACK: &str = include_str!("floor_ack.lua");
/// Of users that have no head yet; any value will do.
const EPOCH: u64 = 4_503_599_627_370_497;

/// Calls the scripts with as few and as short arguments as possible.
pub struct Floor {
    connection: MultiplexedConnection,
    config: RedisConfig,
    accept: String,
    ack: String,
}

impl Floor {
    pub async fn open(mut connection: MultiplexedConnection, config: RedisConfig) -> Result<Self> {
        let mut load = async |script: &str| -> Result<String> {
            let mut cmd = redis::cmd("SCRIPT");
            Ok(cmd.arg("LOAD").arg(script).query_async(&mut connection).await?)
        };
        let (accept, ack) = (load(ACCEPT).await?, load(ACK).await?);
        Ok(Self { connection, config, accept, ack })
    }
}

/// The user's keys: head, queue, routes.
pub fn keys(case: Case, user: usize) -> Result<[String; 3]> {
    let UserKey { app, user } = user_key(case, user)?;
    Ok([
        format!("{{0}}:h:u:{app}:{user}"),
        format!("{{0}}:q:u:{app}:{user}"),
        format!("{{0}}:r:{app}:{user}"),
    ])
}

fn member(case: Case, user: usize) -> Result<String> {
    let UserKey { app, user } = user_key(case, user)?;
    Ok(format!("{app}\0{user}"))
}

impl Side for Floor {
    async fn accept(&mut self, case: Case, batch: &[Message]) -> Result<Vec<Header>> {
        let mut call = redis::cmd("EVALSHA");
        call.arg(&self.accept).arg(2 + 3 * batch.len()).arg("{0}:o").arg("{0}:t");
        for message in batch {
            call.arg(&keys(case, message.user)?);
        }
        let source = source(case);
        let last = batch.last().map_or(0, |message| message.offset);
        call.arg(self.config.entries_max).arg(self.config.ttl_seconds * 1000);
        call.arg(self.config.retry_base_ms).arg(EPOCH);
        call.arg(format!("{}:{}", source.topic_id, source.partition)).arg(format!("0 {last} 0"));
        for message in batch {
            let id = IdHash::of(&message.id);
            call.arg(member(case, message.user)?).arg(&id.ring.to_le_bytes()).arg(id.crc32);
            call.arg(&message.body[..]);
        }
        let replies: Vec<Vec<u8>> = call.query_async(&mut self.connection).await?;
        replies.iter().map(|reply| Ok(Header::parse(reply)?)).collect()
    }

    async fn ack(&mut self, case: Case, batch: &[Acked]) -> Result<()> {
        let mut call = redis::cmd("EVALSHA");
        call.arg(&self.ack).arg(1 + 2 * batch.len()).arg("{0}:t");
        for acked in batch {
            let [head, queue, _] = keys(case, acked.user)?;
            call.arg(head).arg(queue);
        }
        call.arg(self.config.retry_base_ms);
        for Acked { user, header } in batch {
            call.arg(member(case, *user)?).arg("d:phone").arg(header.seq.0).arg(header.chain.0);
        }
        let replies: Vec<u64> = call.query_async(&mut self.connection).await?;
        let expected: Vec<u64> = batch.iter().map(|acked| acked.header.seq.0).collect();
        ensure!(replies == expected, "the floor acknowledged {replies:?}, not {expected:?}");
        Ok(())
    }
}
