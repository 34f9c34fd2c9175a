//! What a newcomer meets in the first hour: errors that name their cause, and the options of `put`, `topics` and `doctor`.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use lfs_broker::dev::Endpoints;
use serde_json::{Value, json};

use crate::harness::TestBroker;
use crate::harness::process::signal;
use crate::harness::tokens::{SECRET, claims, sign};

const PROGRAM: &str = env!("CARGO_BIN_EXE_lfs-broker");

fn command(arguments: &[&str], environment: &[(&str, &str)]) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(arguments).env_clear().envs(environment.iter().copied()).stdin(Stdio::null());
    command
}

/// Runs a command beside the broker of the test, which needs this thread.
async fn output(mut command: Command) -> Output {
    tokio::task::spawn_blocking(move || command.output().expect("the program starts")).await.unwrap()
}

async fn run(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    output(command(arguments, environment)).await
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn json_lines(output: &Output) -> Vec<Value> {
    text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn path(directory: &tempfile::TempDir, name: &str) -> String {
    directory.path().join(name).display().to_string()
}

/// An address on which no program listens.
fn unused_address() -> String {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

#[tokio::test]
async fn a_refused_connection_is_noted_once_before_the_command_gives_up() {
    let address = unused_address();
    let output = run(&["put", "Cargo.toml", "--topic", "t", "--broker", &format!("http://{address}")], &[]).await;
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(5), "{stderr}");
    let lines: Vec<&str> = stderr.lines().collect();
    let note = format!("note: the broker cannot be reached: {address} refused the connection");
    assert!(lines[0].starts_with(&note) && lines[0].contains("retrying for up to 13 s"), "{stderr}");
    assert!(lines[1].starts_with("error: the broker cannot be reached"), "one note only: {stderr}");
}

#[tokio::test]
async fn https_to_an_http_port_is_named_at_once() {
    let broker = TestBroker::start().await;
    let url = broker.url().replace("http://", "https://");
    let output = run(&["topics", "list", "--broker", &url], &[]).await;
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(5), "{stderr}");
    assert!(stderr.starts_with("error:") && stderr.contains("does not speak TLS"), "no retry: {stderr}");
}

#[tokio::test]
async fn an_expired_token_is_called_expired() {
    let broker = TestBroker::start_with_tokens(|_| {}).await;
    let mut expired = claims("acme", "lfs:read lfs:write", &["*"]);
    expired["exp"] = json!(1_000_000_000);
    let (url, token) = (broker.url(), sign(&expired));
    let output = run(&["topics", "list"], &[("LFS_BROKER_URL", &url), ("LFS_BROKER_TOKEN", &token)]).await;
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{stderr}");
    assert!(stderr.contains("401 invalid-token: the token has expired"), "{stderr}");
    assert!(stderr.contains("hint: the token expired at 2001-09-09T01:46:40Z"), "{stderr}");
    // The reason is only for the holder of a token that this broker's key signed.
    let (head, _) = token.rsplit_once('.').unwrap();
    let forged = format!("{head}.AAAA");
    let refused =
        broker.send(broker.request("GET", "/lfs/topics").bearer_auth(forged)).await.expect_problem(401, "invalid-token");
    assert!(!refused.json["detail"].as_str().unwrap().contains("expired"), "{}", refused.text);
    let anonymous = run(&["topics", "list"], &[("LFS_BROKER_URL", &url)]).await;
    assert!(text(&anonymous.stderr).contains("hint: the command has no token"), "{}", text(&anonymous.stderr));
}

#[tokio::test]
async fn errors_of_a_request_have_no_rust_types_and_name_the_states() {
    let broker = TestBroker::start().await;
    let size = broker.post("/lfs/uploads", &json!({"topic": "t", "size": "7"})).await.expect_problem(422, "validation-failed");
    assert_eq!(size.json["errors"][0]["pointer"], "/size");
    assert_eq!(size.json["detail"], r#"wrong type: string "7", expected a whole number, 0 or more"#);
    let state = broker.get("/lfs/uploads?state=done").await.expect_problem(422, "validation-failed");
    assert!(state.json["detail"].as_str().unwrap().contains("open, completing, verified, published"), "{}", state.text);
}

#[tokio::test]
async fn topics_set_keeps_the_members_that_are_not_given() {
    let broker = TestBroker::start().await;
    let url = broker.url();
    let set = async |arguments: &[&str]| {
        let arguments = [["topics", "set", "videos"].as_slice(), arguments].concat();
        let output = run(&arguments, &[("LFS_BROKER_URL", &url)]).await;
        (output.status.code(), json_lines(&output).pop().unwrap_or_default(), text(&output.stderr))
    };
    let (code, _, stderr) = set(&[r#"{"max_bytes":7,"prefix":"lake"}"#]).await;
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stderr.contains("videos: a new policy"), "{stderr}");

    let (_, policy, stderr) = set(&[r#"{"url_seconds":60}"#]).await;
    assert_eq!((&policy["max_bytes"], &policy["prefix"], &policy["url_seconds"]), (&json!(7), &json!("lake"), &json!(60)));
    assert_eq!(stderr, "videos: changed url_seconds from 900 to 60\n");

    let (_, policy, stderr) = set(&[r#"{"max_bytes":null}"#]).await;
    assert_eq!((&policy["max_bytes"], &policy["prefix"]), (&json!(5_497_558_138_880_u64), &json!("lake")));
    assert_eq!(stderr, "videos: changed max_bytes from 7 to 5497558138880\n");
    assert_eq!(set(&[]).await.2, "videos: the policy did not change\n");

    let (_, policy, _) = set(&["--replace", r#"{"max_bytes":9}"#]).await;
    assert_eq!((&policy["max_bytes"], &policy["prefix"], &policy["url_seconds"]), (&json!(9), &Value::Null, &json!(900)));

    // The HTTP interface still replaces the whole policy.
    let replaced = broker.put_policy("videos", &json!({})).await.expect(200);
    assert_eq!(replaced.json["max_bytes"], 5_497_558_138_880_u64);

    let (code, _, stderr) = set(&["{\n  \"max_byte\": 1}"]).await;
    assert_eq!(code, Some(3), "refused by the broker: {stderr}");
    assert!(stderr.contains("unknown member `max_byte`") && stderr.contains("is at line 2, column 3"), "{stderr}");
    let (code, _, stderr) = set(&[r#"{"max_bytes":"7"}"#]).await;
    assert_eq!(code, Some(3), "{stderr}");
    assert!(stderr.contains("expected a whole number, 0 or more; the member `max_bytes` is at line 1, column 2"), "{stderr}");
    let (code, _, stderr) = set(&["[]"]).await;
    assert_eq!(code, Some(2), "{stderr}");
}

#[tokio::test]
async fn put_recursive_uploads_small_files_and_prints_them_in_order_with_one_note() {
    let broker = TestBroker::start().await;
    let url = broker.url();
    let environment = [("LFS_BROKER_URL", url.as_str())];
    let directory = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(directory.path().join("d/e")).unwrap();
    let names: Vec<String> = (0..30).map(|number| format!("d/{number:02}.txt")).chain(["d/e/x.mp4".to_owned()]).collect();
    for (number, name) in names.iter().enumerate() {
        std::fs::write(directory.path().join(name), "x".repeat(number + 1)).unwrap();
    }
    let put = run(&["put", &path(&directory, "d"), "--recursive", "--topic", &broker.topic, "--wait"], &environment).await;
    let stderr = text(&put.stderr);
    assert_eq!(put.status.code(), Some(0), "{stderr}");
    let pointers: Vec<Value> = json_lines(&put).iter().map(|line| line["pointer"].clone()).collect();
    let sizes: Vec<u64> = pointers.iter().map(|pointer| pointer["size"].as_u64().unwrap()).collect();
    assert_eq!(sizes, (1..=31).collect::<Vec<_>>(), "the lines are in the order of the files");
    assert_eq!((&pointers[0]["content_type"], &pointers[30]["content_type"]), (&json!("text/plain"), &json!("video/mp4")));
    let notes: Vec<&str> = stderr.lines().filter(|line| line.starts_with("note:")).collect();
    assert_eq!(notes.len(), 1, "{stderr}");
    assert!(notes[0].ends_with("a normal Kafka record is usually better; 30 more files are smaller too"), "{}", notes[0]);
    assert_eq!(broker.records(&broker.topic).await.len(), 31);

    let refused = run(&["put", &path(&directory, "d"), "--topic", &broker.topic], &environment).await;
    assert_eq!(refused.status.code(), Some(1));
    let expected =
        format!("error: {0} is a directory\nhint: upload the files of a directory with --recursive\n", path(&directory, "d"));
    assert_eq!(text(&refused.stderr), expected);
}

#[tokio::test]
async fn an_error_of_one_small_file_does_not_stop_the_others_and_one_of_all_files_does() {
    let broker = TestBroker::start().await;
    let url = broker.url();
    let environment = [("LFS_BROKER_URL", url.as_str())];
    let directory = tempfile::tempdir().unwrap();
    let names: Vec<String> = (0..20).map(|number| path(&directory, &format!("{number:02}"))).collect();
    for name in names.iter().filter(|name| !name.ends_with("07")) {
        std::fs::write(name, name).unwrap();
    }
    let arguments = |topic: &str| {
        let arguments = ["put", "--topic", topic].map(str::to_owned);
        arguments.into_iter().chain(names.clone()).collect::<Vec<_>>()
    };
    let put = async |topic: &str| {
        let arguments = arguments(topic);
        run(&arguments.iter().map(String::as_str).collect::<Vec<_>>(), &environment).await
    };
    let some = put(&broker.topic).await;
    assert_eq!((some.status.code(), json_lines(&some).len()), (Some(1), 19), "{}", text(&some.stderr));
    assert!(text(&some.stderr).ends_with("error: 1 of 20 files were not uploaded\n"), "{}", text(&some.stderr));
    let none = put("not-there").await;
    let stderr = text(&none.stderr);
    assert_eq!(none.status.code(), Some(3), "{stderr}");
    assert!(stderr.contains(&format!("note: not started: {}", names[1..].join(" "))), "{stderr}");
}

#[tokio::test]
async fn put_sets_the_partition_and_the_file_name() {
    let broker = TestBroker::start().await;
    let url = broker.url();
    let environment = [("LFS_BROKER_URL", url.as_str())];
    let topic = format!("{}-partitioned", broker.topic);
    broker.create_topic(&topic, 4).await;
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("a"), b"a").unwrap();
    let file = path(&directory, "a");
    let arguments = ["put", &file, "--topic", &topic, "--partition", "3", "--filename", "report.pdf", "--wait"];
    let put = run(&arguments, &environment).await;
    assert_eq!(put.status.code(), Some(0), "{}", text(&put.stderr));
    let line = json_lines(&put).remove(0);
    assert_eq!((&line["record"]["partition"], &line["pointer"]["content_type"]), (&json!(3), &json!("application/pdf")));
    let resolved = broker.post("/lfs/resolve", &line["pointer"]).await.expect(200);
    assert_eq!(resolved.json["filename"], "report.pdf");

    let two = run(&["put", &file, &file, "--topic", &topic, "--filename", "x"], &environment).await;
    assert_eq!(two.status.code(), Some(2), "{}", text(&two.stderr));
    let explicit = ["put", &file, "--topic", &topic, "--filename", "a.pdf", "--content-type", "image/png"];
    let explicit = run(&explicit, &environment).await;
    assert_eq!(json_lines(&explicit)[0]["pointer"]["content_type"], "image/png", "{}", text(&explicit.stderr));
}

#[tokio::test]
async fn serve_names_a_missing_bucket_and_its_endpoint() {
    let broker = TestBroker::start().await;
    let s3 = broker.settings.objects.clone();
    let endpoint = s3.endpoint.clone().unwrap();
    let environment = [
        ("DATABASE_URL", broker.settings.store.url.as_str()),
        ("KAFKA_BOOTSTRAP_SERVERS", broker.settings.kafka.bootstrap_servers.as_str()),
        ("AWS_ENDPOINT_URL_S3", endpoint.as_str()),
        ("AWS_ACCESS_KEY_ID", s3.access_key_id.as_deref().unwrap()),
        ("AWS_SECRET_ACCESS_KEY", s3.secret_access_key.as_deref().unwrap()),
        ("AWS_REGION", s3.region.as_deref().unwrap()),
        ("LFS_BROKER_S3_BUCKET", "no-such-bucket"),
        ("LFS_BROKER_LISTEN", "127.0.0.1:0"),
        ("LFS_BROKER_JWT_HS256_SECRET", SECRET),
        ("LFS_BROKER_JWT_ISSUER", "it"),
        ("LFS_BROKER_JWT_AUDIENCE", "it"),
        ("LFS_BROKER_DELIVERY", "at_least_once"),
    ];
    let output = run(&["serve"], &environment).await;
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains(&format!("bucket no-such-bucket does not exist at {endpoint}")), "{stderr}");
    assert!(stderr.contains("hint: create the bucket, or name another one with LFS_BROKER_S3_BUCKET"), "{stderr}");
}

#[tokio::test]
async fn an_unreachable_postgresql_and_a_wrong_password_are_named() {
    let address = unused_address();
    let output = run(&["migrate"], &[("DATABASE_URL", &format!("postgres://u:p@{address}/x"))]).await;
    assert_eq!(output.status.code(), Some(1));
    let stderr = text(&output.stderr);
    assert!(stderr.starts_with(&format!("error: database: no connection to PostgreSQL at {address}: ")), "{stderr}");
    let doctor = [
        ("DATABASE_URL", format!("postgres://u:p@{address}/x")),
        ("KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:1".to_owned()),
        ("LFS_BROKER_AUTH_MODE", "none".to_owned()),
    ];
    let doctor = doctor.each_ref().map(|(name, value)| (*name, value.as_str()));
    let stdout = text(&run(&["doctor"], &doctor).await.stdout);
    assert!(stdout.contains(&format!("FAIL database: database: no connection to PostgreSQL at {address}")), "{stdout}");

    let broker = TestBroker::start().await;
    let (user, rest) = broker.settings.store.url.rsplit_once('@').unwrap();
    let (user, _) = user.rsplit_once(':').unwrap();
    let output = run(&["migrate"], &[("DATABASE_URL", &format!("{user}:wrong@{rest}"))]).await;
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("PostgreSQL refused the password in DATABASE_URL") && !stderr.contains("at line"), "{stderr}");
}

/// Writes the `dev.json` of a `dev` that runs the broker of this test.
fn write_dev_json(directory: &Path, broker: &TestBroker) {
    let s3 = &broker.settings.objects;
    let endpoints = Endpoints {
        broker_url: broker.url(),
        s3_endpoint: s3.endpoint.clone().unwrap(),
        s3_region: s3.region.clone().unwrap(),
        s3_access_key_id: s3.access_key_id.clone().unwrap(),
        s3_secret_access_key: s3.secret_access_key.clone().unwrap(),
        bucket: broker.bucket.clone(),
        kafka_bootstrap: broker.settings.kafka.bootstrap_servers.clone(),
        database_url: broker.settings.store.url.clone(),
        postgres_dir: directory.join("postgres"),
    };
    std::fs::create_dir_all(directory).unwrap();
    std::fs::write(directory.join("dev.json"), serde_json::to_vec(&endpoints).unwrap()).unwrap();
}

#[tokio::test]
async fn doctor_and_audit_use_a_running_dev() {
    let broker = TestBroker::start().await;
    broker.publish(b"hello", json!({})).await;
    let home = tempfile::tempdir().unwrap();
    write_dev_json(&home.path().join(".lfs-broker"), &broker);
    let in_home = async |arguments: &[&str]| {
        let mut command = command(arguments, &[]);
        command.current_dir(home.path());
        output(command).await
    };
    for arguments in [["doctor"].as_slice(), &["audit"]] {
        let missing = in_home(arguments).await;
        assert_eq!(missing.status.code(), Some(2), "{}", text(&missing.stderr));
        assert!(text(&missing.stderr).contains("hint: `lfs-broker dev` runs in this directory"), "{}", text(&missing.stderr));
    }
    let doctor = in_home(&["doctor", "--dev"]).await;
    assert_eq!(doctor.status.code(), Some(0), "{}{}", text(&doctor.stdout), text(&doctor.stderr));
    assert!(text(&doctor.stdout).contains("ok   database: reachable"), "{}", text(&doctor.stdout));
    let audit = in_home(&["audit", "--json", "--dev", ".lfs-broker"]).await;
    assert_eq!(audit.status.code(), Some(0), "{}{}", text(&audit.stdout), text(&audit.stderr));
    assert_eq!(json_lines(&audit)[0]["sessions"], 1, "{}", text(&audit.stdout));
    let other = in_home(&["doctor", "--dev", "elsewhere"]).await;
    assert_eq!(other.status.code(), Some(2));
    assert!(
        text(&other.stderr).contains("no `lfs-broker dev` runs with the data directory elsewhere"),
        "{}",
        text(&other.stderr)
    );
}

#[tokio::test]
async fn an_interrupted_start_of_dev_says_that_it_stops() {
    let home = tempfile::tempdir().unwrap();
    let data_dir = home.path().join("data");
    let mut command = Command::new(PROGRAM);
    command.args(["dev", "--listen", "127.0.0.1:0", "--ephemeral", "--data-dir"]).arg(&data_dir);
    let child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    // The lock exists from the start on.
    for _ in 0..600 {
        if data_dir.join("lock").exists() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    signal(child.id(), "INT");
    let output = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap()).await.unwrap();
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    assert!(stderr.contains("stopping all components"), "{stderr}");
    assert!(!stderr.contains("lfs-broker is ready"), "it was still starting: {stderr}");
}
