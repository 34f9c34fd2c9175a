//! The log: one event is one line, whatever a client sends.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};

use crate::harness::TestBroker;
use crate::harness::tokens::{SECRET, claims};

/// How many invalid tokens per minute an address may send.
const MAX_LOGINS: usize = 8;

/// An unsigned token with this header.
fn token(header: &Value) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    format!("{}.{}.AAAA", part(header), part(&claims("acme", "lfs:read", &["*"])))
}

#[tokio::test]
async fn a_token_cannot_forge_log_lines_and_rate_limited_tokens_are_not_logged() {
    let broker = TestBroker::start().await;
    for format in ["text", "json"] {
        let logins = MAX_LOGINS.to_string();
        let process = broker
            .spawn_process(&[
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
        let control_characters = "a\r\n2026-11-27T00:00:00Z INFO forged\u{1b}[2J\u{9b}31m";
        let mut statuses = Vec::new();
        for header in [
            json!({"alg": control_characters}),
            json!({"alg": long}),
            json!({"alg": "HS256", "kid": control_characters, "typ": control_characters}),
            json!({"alg": "HS256", "typ": control_characters, "crit": [control_characters]}),
        ] {
            for path in [
                "/lfs/uploads".to_owned(),
                format!("/lfs/uploads/{}", "y".repeat(4000)),
                format!("/lfs/uploads?topic={}", "%0a%1b[2J".repeat(9)),
            ] {
                let request = broker.http.get(format!("{}{path}", process.url())).bearer_auth(token(&header));
                let response = broker.send(request.header("x-forwarded-for", "\u{9b}").header("x-request-id", "a b")).await;
                statuses.push(response.status);
            }
        }
        assert_eq!(statuses.iter().filter(|status| **status == 401).count(), MAX_LOGINS, "{statuses:?}");
        assert_eq!(statuses.iter().filter(|status| **status == 429).count(), 12 - MAX_LOGINS, "{statuses:?}");
        process.wait_for_log("refused a token").await;
        broker
            .eventually("every refusal is logged", async || process.log().matches("refused a token").count() >= MAX_LOGINS)
            .await;
        let log = process.log();
        assert_eq!(log.matches("refused a token").count(), MAX_LOGINS, "a 429 is not logged: {log}");
        for line in log.lines() {
            assert!(!line.contains(char::is_control) && line.len() < 2000, "{} bytes: {line:?}", line.len());
            let is_an_event = if format == "json" { serde_json::from_str::<Value>(line).is_ok() } else { line.starts_with("20") };
            assert!(is_an_event && !line.starts_with("2026-11-27T00:00:00Z INFO forged"), "{line}");
        }
        assert!(log.contains("forged"), "the log shows what was sent: {log}");
    }
}
