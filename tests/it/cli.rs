//! The command line: exit codes, hints, and what goes to stdout and stderr.

mod messages;
mod usage;

use std::io::Write as _;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

use crate::harness::fault_proxy::FaultProxy;
use crate::harness::faults::start_with_client_s3_proxy;
use crate::harness::process::signal;
use crate::harness::uploads::PART_BYTES;
use crate::harness::{TestBroker, bytes};

fn run(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lfs-broker"));
    command.args(arguments).env_clear().envs(environment.iter().copied()).stdin(Stdio::null());
    command.output().expect("the program starts")
}

fn run_with_input(arguments: &[&str], environment: &[(&str, &str)], input: &[u8]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lfs-broker"));
    command.args(arguments).env_clear().envs(environment.iter().copied());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // A program that exits before it has read its whole input reports the cause itself.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

async fn run_blocking(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    run_blocking_with(arguments, environment, &[]).await
}

async fn run_blocking_with(arguments: &[&str], environment: &[(&str, &str)], input: &[u8]) -> Output {
    let input = input.to_vec();
    let arguments: Vec<String> = arguments.iter().map(ToString::to_string).collect();
    let environment: Vec<(String, String)> = environment.iter().map(|(a, b)| (a.to_string(), b.to_string())).collect();
    let work = move || {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let environment: Vec<(&str, &str)> = environment.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
        run_with_input(&arguments, &environment, &input)
    };
    tokio::task::spawn_blocking(work).await.unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

const UNREACHABLE_SERVERS: [(&str, &str); 2] =
    [("DATABASE_URL", "postgres://u:p@127.0.0.1:1/x"), ("KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:1")];

#[test]
fn a_missing_setting_is_named_and_is_exit_code_2() {
    let output = run(&["serve", "--check-config"], &[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("DATABASE_URL is not set"), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("hint:"));
}

#[test]
fn a_broker_without_tokens_may_listen_on_loopback_only() {
    for (listen, code) in [("0.0.0.0:8080", 2), ("[::]:8080", 2), ("127.0.0.1:8080", 0), ("[::1]:8080", 0)] {
        let environment =
            [UNREACHABLE_SERVERS[0], UNREACHABLE_SERVERS[1], ("LFS_BROKER_AUTH_MODE", "none"), ("LFS_BROKER_LISTEN", listen)];
        let output = run(&["serve", "--check-config"], &environment);
        assert_eq!(output.status.code(), Some(code), "{listen}: {}", text(&output.stderr));
    }
}

#[test]
fn tokens_need_a_key_an_issuer_and_an_audience() {
    let check_config = |more: &[(&str, &str)]| {
        let environment: Vec<(&str, &str)> = UNREACHABLE_SERVERS.iter().chain(more).copied().collect();
        let output = run(&["serve", "--check-config"], &environment);
        (output.status.code(), text(&output.stderr))
    };
    let secret = ("LFS_BROKER_JWT_HS256_SECRET", "0123456789abcdef0123456789abcdef");
    let (issuer, audience) = (("LFS_BROKER_JWT_ISSUER", "i"), ("LFS_BROKER_JWT_AUDIENCE", "a"));
    assert!(check_config(&[]).1.contains("LFS_BROKER_JWT_HS256_SECRET"));
    assert!(check_config(&[("LFS_BROKER_JWT_HS256_SECRET", "short"), issuer, audience]).1.contains("at least 32"));
    assert!(check_config(&[secret]).1.contains("LFS_BROKER_JWT_ISSUER"));
    assert_eq!(check_config(&[secret, issuer, audience]).0, Some(0));
}

#[test]
fn an_unreachable_database_is_exit_code_1() {
    let output = run(&["migrate"], &[("DATABASE_URL", "postgres://u:p@127.0.0.1:1/x")]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).starts_with("error:"), "{}", text(&output.stderr));
}

#[test]
fn the_openapi_document_and_shell_completions_go_to_stdout() {
    let contract: Value = serde_json::from_slice(&run(&["openapi"], &[]).stdout).unwrap();
    assert!(contract["openapi"].as_str().unwrap().starts_with("3.1"));
    assert!(text(&run(&["completions", "bash"], &[]).stdout).contains("complete -F"));
    assert_eq!(run(&["nonsense"], &[]).status.code(), Some(2));
}

#[tokio::test]
async fn policies_are_set_read_listed_and_deleted() {
    let broker = TestBroker::start().await;
    let url = broker.url();
    let environment = [("LFS_BROKER_URL", url.as_str())];
    let set = run_blocking(&["topics", "set", "videos", r#"{"max_bytes": 7}"#], &environment).await;
    assert_eq!(set.status.code(), Some(0), "{}", text(&set.stderr));
    let got: Value = serde_json::from_slice(&run_blocking(&["topics", "get", "videos"], &environment).await.stdout).unwrap();
    assert_eq!((&got["max_bytes"], &got["enabled"]), (&7.into(), &true.into()));
    let listed = text(&run_blocking(&["topics", "list"], &environment).await.stdout);
    assert!(listed.lines().any(|line| line.contains(r#""topic":"videos""#)), "{listed}");
    assert_eq!(run_blocking(&["topics", "delete", "videos"], &environment).await.status.code(), Some(0));
    let gone = run_blocking(&["topics", "get", "videos"], &environment).await;
    assert_eq!(gone.status.code(), Some(3), "refused by the broker: {}", text(&gone.stderr));
    let wrong = run_blocking(&["topics", "set", "videos", r#"{"max_byte": 7}"#], &environment).await;
    assert_eq!(wrong.status.code(), Some(3), "{}", text(&wrong.stderr));
}

#[tokio::test]
async fn an_unreachable_broker_is_exit_code_5() {
    let output = run_blocking(&["topics", "list", "--broker", "http://127.0.0.1:1"], &[]).await;
    assert_eq!(output.status.code(), Some(5), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("hint:"));
}

#[tokio::test]
async fn put_uploads_a_file_and_get_downloads_it_by_its_pointer() {
    let broker = TestBroker::start().await;
    let url = broker.url();
    let environment = [("LFS_BROKER_URL", url.as_str())];
    let directory = tempfile::tempdir().unwrap();
    let (file, back) = (directory.path().join("a.bin"), directory.path().join("b.bin"));
    let content = bytes(100_000, 1);
    std::fs::write(&file, &content).unwrap();
    let put = ["put", file.to_str().unwrap(), "--topic", &broker.topic, "--key", "k", "--header", "trace=abc", "--wait"];
    let put = run_blocking(&put, &environment).await;
    assert_eq!(put.status.code(), Some(0), "{}", text(&put.stderr));
    let done: Value = serde_json::from_slice(&put.stdout).expect("the response of complete is on stdout");
    assert_eq!(done["state"], "published");
    let records = broker.records(&broker.topic).await;
    assert_eq!(records[0].key.as_deref(), Some(b"k".as_slice()));
    assert!(records[0].headers.contains(&("trace".to_owned(), "abc".to_owned())));

    let got = run_blocking_with(&["get"], &environment, &records[0].value).await;
    assert!(got.stdout == content, "{}", text(&got.stderr));
    let id = done["id"].as_str().unwrap();
    let got = run_blocking(&["get", "--upload", id, "--output", back.to_str().unwrap()], &environment).await;
    assert_eq!(got.status.code(), Some(0), "{}", text(&got.stderr));
    assert!(std::fs::read(&back).unwrap() == content && got.stdout.is_empty());

    let piped = run_blocking_with(&["put", "-", "--topic", &broker.topic, "--json"], &environment, b"from a pipe").await;
    assert_eq!((piped.status.code(), piped.stderr.as_slice()), (Some(0), b"".as_slice()));
    let refused = run_blocking_with(&["put", "-", "--topic", "no/topic"], &environment, b"x").await;
    assert_eq!(refused.status.code(), Some(3), "{}", text(&refused.stderr));
    let no_pointer = run_blocking_with(&["get"], &environment, b"data").await;
    assert_ne!(no_pointer.status.code(), Some(0));
}

#[tokio::test]
async fn put_uploads_each_of_many_files_and_continues_after_one_that_fails() {
    let broker = TestBroker::start().await;
    let url = broker.url();
    let environment = [("LFS_BROKER_URL", url.as_str())];
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    for (name, content) in [("a", "first"), ("it's b", "second")] {
        std::fs::write(path(name), content).unwrap();
    }
    let files = [path("a"), path("missing"), path("it's b"), "-".to_owned()];
    let mut arguments = vec!["put", "--topic", &broker.topic, "--wait"];
    arguments.extend(files.iter().map(String::as_str));
    let output = run_blocking_with(&arguments, &environment, b"third").await;
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains(&format!("error: {}: ", files[1])), "{stderr}");
    assert!(stderr.ends_with("error: 1 of 4 files were not uploaded\n"), "{stderr}");
    let states: Vec<Value> = text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let sizes: Vec<_> = states.iter().map(|line| line["pointer"]["size"].as_u64()).collect();
    assert_eq!(sizes, [Some(5), Some(6), Some(5)], "one line per file, in order");
    assert_eq!(broker.records(&broker.topic).await.len(), 3);

    // Small files are uploaded too. The policy's advice goes to stderr, but not with `--json`.
    assert!(
        stderr.contains(&format!(
            "{} is small (5 bytes): below 8 MiB (the policy member min_bytes of {}) a normal Kafka record",
            files[0], broker.topic
        )),
        "{stderr}"
    );
    let output = run_blocking(&["put", &files[0], "--topic", &broker.topic, "--json"], &environment).await;
    assert_eq!(text(&output.stderr), "");

    // An error that every file would meet ends the command, which then lists the remaining files.
    let output = run_blocking(&["put", &files[0], &files[2], "--topic", "no/topic"], &environment).await;
    assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
    let output = run_blocking(&["put", &files[0], &files[2], "--topic", "not-there"], &environment).await;
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{stderr}");
    assert!(stderr.contains(&format!("note: not started: '{}", directory.path().display())), "{stderr}");
    let output = run_blocking(&["put", &files[0], &files[2], "--topic", "x", "--broker", "http://127.0.0.1:1"], &[]).await;
    assert_eq!(output.status.code(), Some(5), "{}", text(&output.stderr));
}

/// Puts a file into stalled storage and interrupts the command once it sends bytes. Returns the upload's id and the output.
async fn interrupt_put(broker: &TestBroker, proxy: &FaultProxy, file: &Path) -> (String, Output) {
    let (id, child) = spawn_put_until_open(broker, proxy, &[file.to_str().unwrap(), "--wait"], Path::new(".")).await;
    (id, interrupt(child).await)
}

/// Starts a put and waits until it connects to the stalled storage: then it knows its upload. Returns the upload's id.
async fn spawn_put_until_open(broker: &TestBroker, proxy: &FaultProxy, arguments: &[&str], directory: &Path) -> (String, Child) {
    let connections_before = proxy.stalled_connections();
    let mut command = Command::new(env!("CARGO_BIN_EXE_lfs-broker"));
    command.args(["put", "--topic", &broker.topic]).args(arguments).current_dir(directory);
    command.env_clear().env("LFS_BROKER_URL", broker.url());
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    proxy.wait_for_stalled_connections(connections_before + 1).await;
    let open = broker.get("/lfs/uploads?state=open").await;
    (open.json["items"][0]["id"].as_str().expect("an open upload").to_owned(), child)
}

/// Interrupts a command like Ctrl-C and returns its output. An interrupted command exits with code 1.
async fn interrupt(child: Child) -> Output {
    signal(child.id(), "INT");
    let output = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap()).await.unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    output
}

#[tokio::test]
async fn an_interrupted_put_prints_the_command_that_resumes_it() {
    let (broker, proxy) = start_with_client_s3_proxy(|settings| settings.policy.single_put_max_bytes = PART_BYTES as u64).await;
    proxy.stall();
    let directory = tempfile::tempdir().unwrap();
    let (large, small) = (directory.path().join("it's large"), directory.path().join("small"));
    let content = bytes(3 * PART_BYTES + 1, 4);
    std::fs::write(&large, &content).unwrap();
    std::fs::write(&small, b"small").unwrap();

    let (id, output) = interrupt_put(&broker, &proxy, &large).await;
    let stderr = text(&output.stderr);
    let hint = stderr.lines().find_map(|line| line.strip_prefix("hint: resume with: lfs-broker ")).expect(&stderr);
    assert!(hint.contains(&format!("--resume {id} --wait")), "{hint}");
    proxy.restore().await;
    // The hint is run by a shell, because it quotes the file name.
    let line = format!("{} {hint}", env!("CARGO_BIN_EXE_lfs-broker"));
    let output = tokio::task::spawn_blocking(move || Command::new("sh").args(["-c", &line]).output().unwrap()).await.unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(broker.only_record().await.1 == content);

    // A single PUT cannot be resumed: S3 stores nothing of it.
    proxy.stall();
    let (id, output) = interrupt_put(&broker, &proxy, &small).await;
    assert!(text(&output.stderr).contains(&format!("interrupted: upload {id} was aborted")), "{}", text(&output.stderr));
    assert_eq!(broker.upload(&id).await.state(), "aborted");
}

#[tokio::test]
async fn get_replaces_files_and_link_targets_and_writes_into_pipes() {
    let broker = TestBroker::start().await;
    let url = broker.url();
    let environment = [("LFS_BROKER_URL", url.as_str())];
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    broker.publish(b"hello", serde_json::json!({})).await;
    let value = broker.only_record().await.0.value;
    // A partial download that a killed command left.
    std::fs::write(path(".lfs-download-dead"), b"half").unwrap();
    std::fs::write(path("file"), b"before").unwrap();
    std::os::unix::fs::symlink(path("file"), path("link")).unwrap();
    let got = run_blocking_with(&["get", "--output", path("link").to_str().unwrap(), "--json"], &environment, &value).await;
    assert_eq!(got.status.code(), Some(0), "{}", text(&got.stderr));
    assert!(path("link").is_symlink());
    assert_eq!(std::fs::read(path("file")).unwrap(), b"hello");
    let printed: Value = serde_json::from_slice(&got.stdout).unwrap();
    assert_eq!((&printed["size"], &printed["integrity"], printed.get("verified")), (&5.into(), &"sha256".into(), None));

    let pipe = path("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let reader = Command::new("cat").arg(&pipe).stdout(Stdio::piped()).spawn().unwrap();
    let got = run_blocking_with(&["get", "--output", pipe.to_str().unwrap()], &environment, &value).await;
    assert_eq!(got.status.code(), Some(0), "{}", text(&got.stderr));
    assert_eq!(reader.wait_with_output().unwrap().stdout, b"hello");
    let mut left: Vec<_> = std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["file", "link", "pipe"]);
}

#[tokio::test]
async fn an_interrupted_get_leaves_no_file() {
    let (broker, proxy) = start_with_client_s3_proxy(|_| {}).await;
    let id = broker.publish(b"hello", serde_json::json!({})).await.id();
    proxy.stall();
    let directory = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_lfs-broker"));
    command.args(["get", "--upload", &id, "--output"]).arg(directory.path().join("a"));
    command.env_clear().env("LFS_BROKER_URL", broker.url()).stdin(Stdio::null()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    // Its connection is accepted, so the command waits for bytes.
    proxy.wait_for_stalled_connections(1).await;
    let output = interrupt(child).await;
    assert!(text(&output.stderr).contains("interrupted: nothing was written"), "{}", text(&output.stderr));
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn a_token_allows_only_the_topics_and_scopes_that_it_names() {
    let secret = "0123456789abcdef0123456789abcdef";
    let broker = TestBroker::start_with(|settings| {
        settings.objects.allow_copy_source = true;
        settings.auth = lfs_broker::auth::Settings {
            mode: lfs_broker::auth::Mode::Jwt,
            hs256_secret: Some(secret.into()),
            issuer: Some("i".into()),
            audience: Some("a".into()),
            ..Default::default()
        };
    })
    .await;
    let keys = [("LFS_BROKER_JWT_HS256_SECRET", secret), ("LFS_BROKER_JWT_ISSUER", "i"), ("LFS_BROKER_JWT_AUDIENCE", "a")];
    let url = broker.url();
    for (topic, code) in [(broker.topic.as_str(), 0), ("another", 3)] {
        let token = run(&["token", "--tenant", "acme", "--scope", "lfs:write lfs:read", "--topic", topic, "--ttl", "60"], &keys);
        assert_eq!(token.status.code(), Some(0), "{}", text(&token.stderr));
        let token = text(&token.stdout);
        let environment = [("LFS_BROKER_URL", url.as_str()), ("LFS_BROKER_TOKEN", token.trim())];
        let put = run_blocking_with(&["put", "-", "--topic", &broker.topic], &environment, b"x").await;
        assert_eq!(put.status.code(), Some(code), "{}", text(&put.stderr));
    }
    let anonymous = run_blocking_with(&["put", "-", "--topic", &broker.topic], &[("LFS_BROKER_URL", url.as_str())], b"x").await;
    assert_eq!(anonymous.status.code(), Some(3), "{}", text(&anonymous.stderr));
    let reader = run(&["token", "--tenant", "acme", "--scope", "lfs:read", "--topic", &broker.topic], &keys);
    let reader = text(&reader.stdout);
    let environment = [("LFS_BROKER_URL", url.as_str()), ("LFS_BROKER_TOKEN", reader.trim())];
    let refused = run_blocking_with(&["put", "-", "--topic", &broker.topic], &environment, b"x").await;
    assert!(text(&refused.stderr).contains("needs lfs:write"), "{}", text(&refused.stderr));
    let tenant: String = sqlx::query_scalar("select distinct tenant from upload_sessions").fetch_one(&broker.db).await.unwrap();
    assert_eq!(tenant, "acme");
}
