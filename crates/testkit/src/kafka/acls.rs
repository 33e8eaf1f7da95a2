//! Access control lists, for which the client has no calls: two requests of Kafka's protocol.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::time::Duration;

use anyhow::{Result, ensure};

/// API keys and their version, the first with a pattern's type.
const CREATE_ACLS: i16 = 30;
const DELETE_ACLS: i16 = 31;
const VERSION: i16 = 1;
/// Codes of the protocol.
const TOPIC: u8 = 2;
const LITERAL: u8 = 3;
const WRITE: u8 = 4;
const DENY: u8 = 2;

/// Denies everybody to write to a topic, or takes that back.
pub(super) fn allow_writes(port: u16, topic: &str, allowed: bool) -> Result<()> {
    let mut body = 1_i32.to_be_bytes().to_vec();
    body.push(TOPIC);
    text(&mut body, topic);
    body.push(LITERAL);
    text(&mut body, "User:*");
    text(&mut body, "*");
    body.extend([WRITE, DENY]);
    let answer = call(port, if allowed { DELETE_ACLS } else { CREATE_ACLS }, &body)?;
    // Throttle time, the number of results, then the first one's error.
    let error = answer.get(8..10).map(|code| i16::from_be_bytes([code[0], code[1]]));
    ensure!(error == Some(0), "the broker refused to change an ACL: {error:?}");
    Ok(())
}

fn text(body: &mut Vec<u8>, text: &str) {
    body.extend((text.len() as i16).to_be_bytes());
    body.extend(text.as_bytes());
}

fn call(port: u16, api: i16, body: &[u8]) -> Result<Vec<u8>> {
    let mut request = Vec::new();
    request.extend(api.to_be_bytes());
    request.extend(VERSION.to_be_bytes());
    request.extend(7_i32.to_be_bytes()); // correlation
    text(&mut request, "testkit");
    request.extend(body);
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    stream.write_all(&(request.len() as i32).to_be_bytes())?;
    stream.write_all(&request)?;
    let mut size = [0; 4];
    stream.read_exact(&mut size)?;
    let mut answer = vec![0; usize::try_from(i32::from_be_bytes(size))?];
    stream.read_exact(&mut answer)?;
    ensure!(answer.len() > 4, "an answer without a body");
    Ok(answer.split_off(4))
}
