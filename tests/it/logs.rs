//! The log: one event, one line, whatever strangers send.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};

use crate::harness::House;
use crate::harness::tokens::{SECRET, claims};

/// How many tokens that are not valid an address may try.
const LOGINS: usize = 8;

/// A token with this header, signed by nobody.
fn token(header: &Value) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    format!("{}.{}.AAAA", part(header), part(&claims("acme", "lfs:read", &["*"])))
}

#[tokio::test]
async fn a_token_writes_no_log_line_of_its_own_and_none_once_it_is_limited() {
    let house = House::new().await;
    for format in ["text", "json"] {
        let logins = LOGINS.to_string();
        let serving = house
            .serving(&[
                ("LFS_BROKER_LOG_FORMAT", format),
                ("RUST_LOG", "lfs_broker=debug"),
                ("LFS_BROKER_AUTH_MODE", "jwt"),
                ("LFS_BROKER_JWT_HS256_SECRET", SECRET),
                ("LFS_BROKER_JWT_ISSUER", "it"),
                ("LFS_BROKER_JWT_AUDIENCE", "it"),
                ("LFS_BROKER_S3_ALLOW_COPY_SOURCE", "true"),
                ("LFS_BROKER_FAILED_LOGINS_PER_MINUTE", &logins),
            ])
            .await;
        let long = "x".repeat(11_000);
        let evil = "a\r\n2026-11-27T00:00:00Z INFO forged\u{1b}[2J\u{9b}31m";
        let mut statuses = Vec::new();
        for header in [
            json!({"alg": evil}),
            json!({"alg": long}),
            json!({"alg": "HS256", "kid": evil, "typ": evil}),
            json!({"alg": "HS256", "typ": evil, "crit": [evil]}),
        ] {
            for path in [
                "/lfs/uploads".to_owned(),
                format!("/lfs/uploads/{}", "y".repeat(4000)),
                format!("/lfs/uploads?topic={}", "%0a%1b[2J".repeat(9)),
            ] {
                let request = house.http.get(format!("{}{path}", serving.url())).bearer_auth(token(&header));
                let answer = house.send(request.header("x-forwarded-for", "\u{9b}").header("x-request-id", "a b")).await;
                statuses.push(answer.status);
            }
        }
        assert_eq!(statuses.iter().filter(|status| **status == 401).count(), LOGINS, "{statuses:?}");
        assert_eq!(statuses.iter().filter(|status| **status == 429).count(), 12 - LOGINS, "{statuses:?}");
        serving.says("refused a token").await;
        house
            .eventually("all that is logged is there", async || serving.log().matches("refused a token").count() >= LOGINS)
            .await;
        let log = serving.log();
        assert_eq!(log.matches("refused a token").count(), LOGINS, "what is answered 429 is not logged: {log}");
        for line in log.lines() {
            assert!(!line.contains(char::is_control) && line.len() < 2000, "{} bytes: {line:?}", line.len());
            let is_an_event = if format == "json" { serde_json::from_str::<Value>(line).is_ok() } else { line.starts_with("20") };
            assert!(is_an_event && !line.starts_with("2026-11-27T00:00:00Z INFO forged"), "{line}");
        }
        assert!(log.contains("forged"), "an operator sees what came: {log}");
    }
}
