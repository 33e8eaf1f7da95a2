//! New connections to Redis, with errors that name the address and the cause.

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client};

use crate::Error;
use crate::error::cause;

/// Connects. Its errors name `host:port`, never a user or a password.
pub(crate) async fn dial(
    client: &Client,
    config: &AsyncConnectionConfig,
) -> Result<MultiplexedConnection, Error> {
    let connected = client.get_multiplexed_async_connection_with_config(config).await;
    connected.map_err(|error| {
        let address = client.get_connection_info().addr();
        let why = cause(&error);
        match Error::from(error) {
            Error::Away(_) => Error::Away(format!("{address}: {why}")),
            Error::Unusable(_) => Error::Unusable(format!("{address}: {why}")),
            other => other,
        }
    })
}

/// Logs an error of Redis if it was not logged within `log.repeat_seconds`, by whichever task met it.
macro_rules! warn_sparingly {
    ($error:expr, $($text:tt)+) => {{
        let why = $error.to_string();
        if let Some(repeated) = barid_runtime::repeats::due(&why) {
            tracing::warn!(error = why, repeated, $($text)+);
        }
    }};
}
pub(crate) use warn_sparingly;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn hazard_118_an_error_names_address_and_cause_and_no_password() {
        let limit = Some(Duration::from_millis(300));
        let config = AsyncConnectionConfig::new().set_connection_timeout(limit);
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let silent = silent.local_addr().unwrap();
        for (at, told) in [
            ("127.0.0.1:1".into(), "127.0.0.1:1: connection refused"),
            ("no.invalid:7".into(), "no.invalid:7: the host name cannot be resolved: "),
            (silent.to_string(), ": no answer in time"),
        ] {
            let client = Client::open(format!("redis://me:hush@{at}")).unwrap();
            let Err(error) = dial(&client, &config).await else { panic!("{at} answers") };
            let error = error.to_string();
            assert!(error.starts_with("redis is away: ") && error.contains(told), "{error}");
            assert!(error.contains(&at) && !error.contains("hush"), "{error}");
        }
    }
}
