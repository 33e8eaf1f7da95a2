//! `barid token`: signs a token, or checks one.

pub mod check;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use barid_core::{AppId, DeviceId, GroupId, UserId};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde::Serialize;

use crate::output::{Coded, Output};
use crate::values::{self, Key, KeyArgs};

/// Options of `barid token`.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Args {
    #[command(subcommand)]
    pub action: Option<Action>,
    /// App
    #[arg(long, default_value = "demo", env = "BARID_APP")]
    pub app: AppId,
    /// User
    #[arg(long, required = true)]
    pub user: Option<UserId>,
    /// Only device that may use the token
    #[arg(long)]
    pub device: Option<DeviceId>,
    /// Group that the device may subscribe to; may be repeated
    #[arg(long = "group", value_name = "GROUP")]
    pub groups: Vec<GroupId>,
    /// Time to live: 30s, 15m, 1h, 7d
    #[arg(long, default_value = "1h", value_parser = values::positive_duration)]
    pub ttl: Duration,
    #[command(flatten)]
    pub key: KeyArgs,
}

/// The actions of `barid token`.
#[derive(Debug, clap::Subcommand)]
pub enum Action {
    /// Check a token as an access node does: accepted, or refused and why
    Check(check::Args),
}

/// The user, device and groups of a token.
#[derive(Debug, Clone)]
pub struct Holder {
    pub app: AppId,
    pub user: UserId,
    pub device: Option<DeviceId>,
    pub groups: Vec<GroupId>,
}

#[derive(Serialize)]
struct Claims<'a> {
    app: &'a str,
    sub: &'a str,
    iat: u64,
    exp: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    groups: Vec<&'a str>,
}

#[derive(Serialize)]
struct Made<'a> {
    token: &'a str,
    app: &'a str,
    user: &'a str,
    expires_at_ms: u64,
}

/// Prints a token, or checks one.
pub async fn run(args: Args, out: Output) -> anyhow::Result<ExitCode> {
    let user = match (args.action, args.user) {
        (Some(Action::Check(args)), _) => return check::run(args, out).await,
        (None, Some(user)) => user,
        (None, None) => bail!(Coded::config("--user is missing")),
    };
    let holder = Holder { app: args.app, user, device: args.device, groups: args.groups };
    let (token, expires_at_ms) = sign(&args.key.key()?, &holder, args.ttl)?;
    let (app, user) = (holder.app.as_str(), holder.user.as_str());
    let made = Made { token: &token, app, user, expires_at_ms };
    out.either(&made, || token.clone())?;
    Ok(ExitCode::SUCCESS)
}

/// Signs a token. Returns its time of expiry as well, ms since the Unix epoch.
pub fn sign(key: &Key, holder: &Holder, ttl: Duration) -> anyhow::Result<(String, u64)> {
    let now_s = values::now_ms() / 1000;
    let claims = Claims {
        app: holder.app.as_str(),
        sub: holder.user.as_str(),
        iat: now_s,
        exp: now_s + ttl.as_secs(),
        device: holder.device.as_ref().map(DeviceId::as_str),
        groups: holder.groups.iter().map(GroupId::as_str).collect(),
    };
    let mut header = Header::new(Algorithm::HS256);
    header.kid.clone_from(&key.id);
    let secret = EncodingKey::from_secret(key.secret.expose().as_bytes());
    let token = jsonwebtoken::encode(&header, &claims, &secret).context("cannot sign the token")?;
    Ok((token, claims.exp * 1000))
}

#[cfg(test)]
mod tests {
    use super::*;
    use barid_core::Secret;
    use jsonwebtoken::{DecodingKey, Validation};

    #[test]
    fn tokens_carry_what_access_checks() {
        let key =
            Key { secret: Secret::new("0123456789abcdef0123456789abcdef"), id: Some("k1".into()) };
        let holder = Holder {
            app: AppId::new("demo").unwrap(),
            user: UserId::new("alice").unwrap(),
            device: Some(DeviceId::new("phone").unwrap()),
            groups: vec![GroupId::new("eng").unwrap()],
        };
        let (token, expires_at_ms) = sign(&key, &holder, Duration::from_secs(60)).unwrap();
        assert_eq!(jsonwebtoken::decode_header(&token).unwrap().kid.as_deref(), Some("k1"));
        let secret = DecodingKey::from_secret(key.secret.expose().as_bytes());
        let decoded = jsonwebtoken::decode::<serde_json::Value>(
            &token,
            &secret,
            &Validation::new(Algorithm::HS256),
        );
        let claims = decoded.unwrap().claims;
        assert_eq!((claims["app"].as_str(), claims["sub"].as_str()), (Some("demo"), Some("alice")));
        assert_eq!(claims["device"], "phone");
        assert_eq!(claims["groups"], serde_json::json!(["eng"]));
        assert_eq!(claims["exp"].as_u64(), Some(expires_at_ms / 1000));
    }
}
