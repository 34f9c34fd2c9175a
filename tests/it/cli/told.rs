//! What commands say when something is away, ends half-way, or nobody listens.

use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use super::{SERVERS, held_up, interrupt, run_aside, run_aside_with, text};
use crate::faults::{faulty, house_on};
use crate::harness::faults::clients_behind_s3;
use crate::harness::serving::signal;
use crate::harness::uploads::PART;
use crate::harness::{House, bytes};

/// Runs a command whose output nobody takes.
async fn unheard(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = Command::new(env!("CARGO_BIN_EXE_lfs-broker"));
    command.args(arguments).env_clear().envs(environment.iter().copied());
    command.stdin(Stdio::null()).stdout(writer).stderr(Stdio::piped());
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

/// The settings of a command that is run beside a house, on its neighbours.
fn beside(house: &House) -> Vec<(&str, &str)> {
    let (settings, s3) = (&house.settings, &house.settings.objects);
    vec![
        ("DATABASE_URL", settings.store.url.as_str()),
        ("KAFKA_BOOTSTRAP_SERVERS", settings.kafka.bootstrap_servers.as_str()),
        ("AWS_ENDPOINT_URL_S3", s3.endpoint.as_deref().unwrap()),
        ("AWS_ACCESS_KEY_ID", s3.access_key_id.as_deref().unwrap()),
        ("AWS_SECRET_ACCESS_KEY", s3.secret_access_key.as_deref().unwrap()),
        ("AWS_REGION", s3.region.as_deref().unwrap()),
        ("LFS_BROKER_AUTH_MODE", "none"),
        ("LFS_BROKER_DELIVERY", if house.is_exactly_once() { "exactly_once" } else { "at_least_once" }),
    ]
}

#[tokio::test]
async fn output_that_nobody_takes_is_an_error_and_no_panic() {
    let house = House::new().await;
    house.put_policy("videos", &json!({})).await.expect(200);
    let url = house.url();
    let mut environment = beside(&house);
    environment.extend([("LFS_BROKER_URL", url.as_str()), ("LFS_BROKER_S3_BUCKET", house.bucket.as_str())]);
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
        let told = unheard(arguments, &environment).await;
        assert_eq!(told.status.code(), Some(1), "{arguments:?}: {}", text(&told.stderr));
        assert!(text(&told.stderr).contains("error: cannot write the output"), "{arguments:?}: {}", text(&told.stderr));
    }
}

#[tokio::test]
async fn files_after_one_whose_answer_nobody_takes_are_told_as_not_begun() {
    let house = House::new().await;
    let directory = tempfile::tempdir().unwrap();
    let names = ["a", "b", "c"].map(|name| directory.path().join(name).display().to_string());
    names.iter().for_each(|name| std::fs::write(name, name).unwrap());
    let arguments = ["put", &names[0], &names[1], &names[2], "--topic", &house.topic];
    let told = unheard(&arguments, &[("LFS_BROKER_URL", &house.url())]).await;
    assert_eq!(told.status.code(), Some(1));
    assert!(text(&told.stderr).contains(&format!("not begun: {} {}", names[1], names[2])), "{}", text(&told.stderr));
}

#[tokio::test]
async fn doctor_tells_machines_what_is_away_and_why() {
    let told = run_aside(&["doctor", "--json"], &[SERVERS[0], SERVERS[1], ("LFS_BROKER_AUTH_MODE", "none")]).await;
    assert_eq!(told.status.code(), Some(1), "{}", text(&told.stderr));
    let report: Value = serde_json::from_slice(&told.stdout).expect("one object on stdout");
    let named = |name: &str| report["checks"].as_array().unwrap().iter().find(|check| check["name"] == name).unwrap();
    assert_eq!((&report["ok"], &report["capabilities"]), (&json!(false), &Value::Null));
    assert_eq!(named("settings")["ok"], true);
    for name in ["database", "kafka", "s3"] {
        assert_eq!(named(name)["ok"], false, "{report}");
        assert!(named(name)["text"].as_str().is_some_and(|text| text.len() > 10), "{report}");
    }
    let house = House::new().await;
    let mut environment = beside(&house);
    environment.push(("LFS_BROKER_S3_BUCKET", house.bucket.as_str()));
    let told = run_aside(&["doctor", "--json"], &environment).await;
    let report: Value = serde_json::from_slice(&told.stdout).expect("one object on stdout");
    assert_eq!(report["capabilities"]["keeps_token"], true, "{report}");
    assert!(report["checks"].as_array().unwrap().iter().any(|check| check["name"] == "kafka" && check["ok"] == true));
}

#[tokio::test]
async fn doctor_warns_of_a_risk_that_the_settings_accept_and_does_not_fail() {
    let s3 = faulty().await;
    s3.accept_copy_sources();
    let house = house_on(&s3).await;
    let endpoint = s3.endpoint();
    let jwt = |allow: &'static str| {
        let mut environment = beside(&house);
        environment.retain(|(name, _)| !matches!(*name, "AWS_ENDPOINT_URL_S3" | "LFS_BROKER_AUTH_MODE"));
        environment.extend([
            ("AWS_ENDPOINT_URL_S3", endpoint.as_str()),
            ("LFS_BROKER_S3_BUCKET", house.bucket.as_str()),
            ("LFS_BROKER_JWT_HS256_SECRET", "a secret of at least 32 characters"),
            ("LFS_BROKER_JWT_ISSUER", "it"),
            ("LFS_BROKER_JWT_AUDIENCE", "it"),
            ("LFS_BROKER_S3_ALLOW_COPY_SOURCE", allow),
        ]);
        environment
    };
    let refused = run_aside(&["doctor"], &jwt("false")).await;
    assert!(text(&refused.stdout).contains("FAIL s3: NOT: refuses an unsigned copy-source"), "{}", text(&refused.stdout));
    assert_eq!(refused.status.code(), Some(1));
    let accepted = run_aside(&["doctor"], &jwt("true")).await;
    assert!(text(&accepted.stdout).contains("warn s3: NOT: refuses an unsigned copy-source"), "{}", text(&accepted.stdout));
    assert_eq!(accepted.status.code(), Some(0), "{}", text(&accepted.stdout));
}

#[tokio::test]
async fn doctor_fails_on_a_signing_secret_that_is_wrong_and_names_what_cannot_be_reached() {
    let house = House::new().await;
    let mut environment = beside(&house);
    environment.retain(|(name, _)| *name != "KAFKA_BOOTSTRAP_SERVERS");
    environment.extend([
        ("LFS_BROKER_S3_BUCKET", house.bucket.as_str()),
        ("LFS_BROKER_S3_SIGNING_ACCESS_KEY_ID", house.settings.objects.access_key_id.as_deref().unwrap()),
        ("LFS_BROKER_S3_SIGNING_SECRET_ACCESS_KEY", "another secret, long enough"),
        ("KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:9"),
    ]);
    let told = text(&run_aside(&["doctor"], &environment).await.stdout);
    assert!(told.contains("FAIL s3:") && told.contains("SignatureDoesNotMatch"), "{told}");
    assert!(told.contains("FAIL kafka:") && told.contains("127.0.0.1:9"), "{told}");
    assert!(told.contains("ok   database: reachable, schema current, takes writes"), "{told}");
}

#[tokio::test]
async fn a_killed_put_has_told_machines_too_which_upload_to_go_on_with() {
    let (house, wire) = clients_behind_s3(|settings| settings.policy.single_put_max_bytes = PART as u64).await;
    wire.silence();
    let directory = tempfile::tempdir().unwrap();
    // A name that a command would take for an option.
    std::fs::write(directory.path().join("-big"), bytes(2 * PART, 6)).unwrap();
    let (id, child) = held_up(&house, &["--json", "./-big"], directory.path()).await;
    signal(child.id(), "KILL");
    let told = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap()).await.unwrap();
    assert!(text(&told.stderr).contains(&format!("upload {id}")), "{}", text(&told.stderr));
    house.delete(&format!("/lfs/uploads/{id}")).await.expect(204);

    let (id, child) = held_up(&house, &["--key", "k", "--", "-big"], directory.path()).await;
    let told = interrupt(child).await;
    let wanted = format!("hint: go on with: lfs-broker put ./-big --topic {} --resume {id}", house.topic);
    assert!(text(&told.stderr).contains(&wanted), "{}", text(&told.stderr));
}

#[tokio::test]
async fn a_put_that_waited_in_vain_for_kafka_is_not_called_done() {
    let house = House::with(|settings| settings.broker.complete_wait = Duration::ZERO).await;
    // The relay cannot take its shards, so nothing is sent.
    let mut held = house.db.begin().await.unwrap();
    sqlx::raw_sql("lock table relay_shards in access exclusive mode").execute(&mut *held).await.unwrap();
    let url = house.url();
    let arguments = ["put", "-", "--topic", &house.topic, "--wait", "--wait-seconds", "1"];
    let told = run_aside_with(&arguments, &[("LFS_BROKER_URL", &url)], b"late").await;
    held.rollback().await.unwrap();
    let done: Value = serde_json::from_slice(&told.stdout).expect("complete's answer on stdout");
    assert_eq!((told.status.code(), &done["state"]), (Some(1), &json!("verified")), "{}", text(&told.stderr));
    assert!(text(&told.stderr).contains("promised, and not yet in Kafka after 1 s"), "{}", text(&told.stderr));
    house.until(done["id"].as_str().unwrap(), "published").await;
}

#[tokio::test]
async fn storage_that_is_away_is_not_taken_for_the_broker() {
    let (house, wire) = clients_behind_s3(|_| {}).await;
    let id = house.publish(b"hello", json!({})).await.id();
    wire.refuse().await;
    let told = run_aside(&["get", "--upload", &id], &[("LFS_BROKER_URL", &house.url())]).await;
    let words = text(&told.stderr);
    assert_eq!(told.status.code(), Some(5), "{words}");
    assert!(words.contains("storage cannot be reached") && words.contains("LFS_BROKER_S3_PUBLIC_ENDPOINT"), "{words}");
    assert!(!words.contains("--broker"), "{words}");
}

#[tokio::test]
async fn topics_take_json_as_every_command_does() {
    let house = House::new().await;
    let url = house.url();
    let listed = run_aside(&["topics", "list", "--json"], &[("LFS_BROKER_URL", &url)]).await;
    assert_eq!(listed.status.code(), Some(0), "{}", text(&listed.stderr));
}
