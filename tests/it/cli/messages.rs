//! What commands print when a server is away, when they are interrupted, or when their output is closed.

use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use super::{UNREACHABLE_SERVERS, interrupt, run_blocking, run_blocking_with, spawn_put_until_open, text};
use crate::harness::faults::start_with_client_s3_proxy;
use crate::harness::process::signal;
use crate::harness::uploads::PART_BYTES;
use crate::harness::{TestBroker, bytes};
use crate::s3_faults::{start_broker_on, start_faulty_s3};

/// Runs a command whose stdout is a closed pipe.
async fn run_with_closed_stdout(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = Command::new(env!("CARGO_BIN_EXE_lfs-broker"));
    command.args(arguments).env_clear().envs(environment.iter().copied());
    command.stdin(Stdio::null()).stdout(writer).stderr(Stdio::piped());
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

/// The settings of a command that uses the test broker's servers.
fn environment_of(broker: &TestBroker) -> Vec<(&str, &str)> {
    let (settings, s3) = (&broker.settings, &broker.settings.objects);
    vec![
        ("DATABASE_URL", settings.store.url.as_str()),
        ("KAFKA_BOOTSTRAP_SERVERS", settings.kafka.bootstrap_servers.as_str()),
        ("AWS_ENDPOINT_URL_S3", s3.endpoint.as_deref().unwrap()),
        ("AWS_ACCESS_KEY_ID", s3.access_key_id.as_deref().unwrap()),
        ("AWS_SECRET_ACCESS_KEY", s3.secret_access_key.as_deref().unwrap()),
        ("AWS_REGION", s3.region.as_deref().unwrap()),
        ("LFS_BROKER_AUTH_MODE", "none"),
        ("LFS_BROKER_DELIVERY", if broker.is_exactly_once() { "exactly_once" } else { "at_least_once" }),
    ]
}

#[tokio::test]
async fn a_closed_stdout_is_an_error_and_no_panic() {
    let broker = TestBroker::start().await;
    broker.put_policy("videos", &json!({})).await.expect(200);
    let url = broker.url();
    let mut environment = environment_of(&broker);
    environment.extend([("LFS_BROKER_URL", url.as_str()), ("LFS_BROKER_S3_BUCKET", broker.bucket.as_str())]);
    for arguments in [
        ["openapi"].as_slice(),
        &["completions", "bash"],
        &["topics", "list"],
        &["topics", "get", "videos"],
        &["topics", "set", "videos"],
        &["doctor"],
        &["doctor", "--json"],
        &["audit"],
        &["audit", "--json"],
    ] {
        let output = run_with_closed_stdout(arguments, &environment).await;
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {}", text(&output.stderr));
        assert!(text(&output.stderr).contains("error: cannot write the output"), "{arguments:?}: {}", text(&output.stderr));
    }
}

#[tokio::test]
async fn put_lists_the_files_that_it_has_not_begun_when_stdout_is_closed() {
    let broker = TestBroker::start().await;
    let directory = tempfile::tempdir().unwrap();
    let names = ["a", "b", "c"].map(|name| directory.path().join(name).display().to_string());
    names.iter().for_each(|name| std::fs::write(name, name).unwrap());
    let arguments = ["put", &names[0], &names[1], &names[2], "--topic", &broker.topic];
    let output = run_with_closed_stdout(&arguments, &[("LFS_BROKER_URL", &broker.url())]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains(&format!("not started: {} {}", names[1], names[2])), "{}", text(&output.stderr));
}

#[tokio::test]
async fn doctor_json_names_each_unreachable_server_and_the_cause() {
    let output =
        run_blocking(&["doctor", "--json"], &[UNREACHABLE_SERVERS[0], UNREACHABLE_SERVERS[1], ("LFS_BROKER_AUTH_MODE", "none")])
            .await;
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).expect("one object on stdout");
    let named = |name: &str| report["checks"].as_array().unwrap().iter().find(|check| check["name"] == name).unwrap();
    assert_eq!((&report["ok"], &report["capabilities"]), (&json!(false), &Value::Null));
    assert_eq!(named("settings")["ok"], true);
    for name in ["database", "kafka", "s3"] {
        assert_eq!(named(name)["ok"], false, "{report}");
        assert!(named(name)["text"].as_str().is_some_and(|text| text.len() > 10), "{report}");
    }
    let broker = TestBroker::start().await;
    let mut environment = environment_of(&broker);
    environment.push(("LFS_BROKER_S3_BUCKET", broker.bucket.as_str()));
    let output = run_blocking(&["doctor", "--json"], &environment).await;
    let report: Value = serde_json::from_slice(&output.stdout).expect("one object on stdout");
    assert_eq!(report["capabilities"]["keeps_token"], true, "{report}");
    assert!(report["checks"].as_array().unwrap().iter().any(|check| check["name"] == "kafka" && check["ok"] == true));
}

#[tokio::test]
async fn doctor_warns_of_a_risk_that_the_settings_accept_and_exits_with_0() {
    let s3 = start_faulty_s3().await;
    s3.ignore_copy_source_header();
    let broker = start_broker_on(&s3).await;
    let endpoint = s3.endpoint();
    let jwt = |allow: &'static str| {
        let mut environment = environment_of(&broker);
        environment.retain(|(name, _)| !matches!(*name, "AWS_ENDPOINT_URL_S3" | "LFS_BROKER_AUTH_MODE"));
        environment.extend([
            ("AWS_ENDPOINT_URL_S3", endpoint.as_str()),
            ("LFS_BROKER_S3_BUCKET", broker.bucket.as_str()),
            ("LFS_BROKER_JWT_HS256_SECRET", "a secret of at least 32 characters"),
            ("LFS_BROKER_JWT_ISSUER", "it"),
            ("LFS_BROKER_JWT_AUDIENCE", "it"),
            ("LFS_BROKER_S3_ALLOW_COPY_SOURCE", allow),
        ]);
        environment
    };
    let refused = run_blocking(&["doctor"], &jwt("false")).await;
    assert!(text(&refused.stdout).contains("FAIL s3: NOT: refuses an unsigned copy-source"), "{}", text(&refused.stdout));
    assert_eq!(refused.status.code(), Some(1));
    let accepted = run_blocking(&["doctor"], &jwt("true")).await;
    assert!(text(&accepted.stdout).contains("warn s3: NOT: refuses an unsigned copy-source"), "{}", text(&accepted.stdout));
    assert_eq!(accepted.status.code(), Some(0), "{}", text(&accepted.stdout));
}

#[tokio::test]
async fn doctor_fails_on_a_wrong_signing_secret_and_names_an_unreachable_kafka() {
    let broker = TestBroker::start().await;
    let mut environment = environment_of(&broker);
    environment.retain(|(name, _)| *name != "KAFKA_BOOTSTRAP_SERVERS");
    environment.extend([
        ("LFS_BROKER_S3_BUCKET", broker.bucket.as_str()),
        ("LFS_BROKER_S3_SIGNING_ACCESS_KEY_ID", broker.settings.objects.access_key_id.as_deref().unwrap()),
        ("LFS_BROKER_S3_SIGNING_SECRET_ACCESS_KEY", "another secret, long enough"),
        ("KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:9"),
    ]);
    let output = text(&run_blocking(&["doctor"], &environment).await.stdout);
    assert!(output.contains("FAIL s3:") && output.contains("SignatureDoesNotMatch"), "{output}");
    assert!(output.contains("FAIL kafka:") && output.contains("127.0.0.1:9"), "{output}");
    assert!(output.contains("ok   database: reachable, schema current, takes writes"), "{output}");
}

#[tokio::test]
async fn a_put_that_is_killed_has_already_printed_which_upload_to_resume() {
    let (broker, proxy) = start_with_client_s3_proxy(|settings| settings.policy.single_put_max_bytes = PART_BYTES as u64).await;
    proxy.stall();
    let directory = tempfile::tempdir().unwrap();
    // A file name that a command would parse as an option.
    std::fs::write(directory.path().join("-big"), bytes(2 * PART_BYTES, 6)).unwrap();
    let (id, child) = spawn_put_until_open(&broker, &proxy, &["--json", "./-big"], directory.path()).await;
    signal(child.id(), "KILL");
    let output = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap()).await.unwrap();
    assert!(text(&output.stderr).contains(&format!("upload {id}")), "{}", text(&output.stderr));
    broker.delete(&format!("/lfs/uploads/{id}")).await.expect(204);

    let (id, child) = spawn_put_until_open(&broker, &proxy, &["--key", "k", "--", "-big"], directory.path()).await;
    let output = interrupt(child).await;
    let expected = format!("hint: resume with: lfs-broker put ./-big --topic {} --resume {id}", broker.topic);
    assert!(text(&output.stderr).contains(&expected), "{}", text(&output.stderr));
}

#[tokio::test]
async fn a_put_that_waits_in_vain_for_kafka_exits_with_code_1() {
    let broker = TestBroker::start_with(|settings| settings.broker.complete_wait = Duration::ZERO).await;
    // The relay cannot acquire its shards, so it publishes nothing.
    let mut table_lock = broker.db.begin().await.unwrap();
    sqlx::raw_sql("lock table relay_shards in access exclusive mode").execute(&mut *table_lock).await.unwrap();
    let url = broker.url();
    let arguments = ["put", "-", "--topic", &broker.topic, "--wait", "--wait-seconds", "1"];
    let output = run_blocking_with(&arguments, &[("LFS_BROKER_URL", &url)], b"late").await;
    table_lock.rollback().await.unwrap();
    let done: Value = serde_json::from_slice(&output.stdout).expect("the response of complete is on stdout");
    assert_eq!((output.status.code(), &done["state"]), (Some(1), &json!("verified")), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("is verified, but not yet in Kafka after 1 s"), "{}", text(&output.stderr));
    broker.wait_for_state(done["id"].as_str().unwrap(), "published").await;
}

#[tokio::test]
async fn unreachable_storage_is_not_reported_as_an_unreachable_broker() {
    let (broker, proxy) = start_with_client_s3_proxy(|_| {}).await;
    let id = broker.publish(b"hello", json!({})).await.id();
    proxy.refuse_connections().await;
    let output = run_blocking(&["get", "--upload", &id], &[("LFS_BROKER_URL", &broker.url())]).await;
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(5), "{stderr}");
    assert!(stderr.contains("storage cannot be reached") && stderr.contains("LFS_BROKER_S3_PUBLIC_ENDPOINT"), "{stderr}");
    assert!(!stderr.contains("--broker"), "{stderr}");
}

#[tokio::test]
async fn topics_list_accepts_json() {
    let broker = TestBroker::start().await;
    let url = broker.url();
    let listed = run_blocking(&["topics", "list", "--json"], &[("LFS_BROKER_URL", &url)]).await;
    assert_eq!(listed.status.code(), Some(0), "{}", text(&listed.stderr));
}
