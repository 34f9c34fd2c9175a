//! The command line: exit codes, hints, and what is printed where.

mod told;
mod usage;

use std::io::Write as _;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

use crate::harness::faults::clients_behind_s3;
use crate::harness::serving::signal;
use crate::harness::uploads::PART;
use crate::harness::{House, bytes};

fn run(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lfs-broker"));
    command.args(arguments).env_clear().envs(environment.iter().copied()).stdin(Stdio::null());
    command.output().expect("the program starts")
}

fn run_with_input(arguments: &[&str], environment: &[(&str, &str)], input: &[u8]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lfs-broker"));
    command.args(arguments).env_clear().envs(environment.iter().copied());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // A program that ends before it has read all of it says why itself.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

async fn run_aside(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    run_aside_with(arguments, environment, &[]).await
}

async fn run_aside_with(arguments: &[&str], environment: &[(&str, &str)], input: &[u8]) -> Output {
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

const SERVERS: [(&str, &str); 2] = [("DATABASE_URL", "postgres://u:p@127.0.0.1:1/x"), ("KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:1")];

#[test]
fn a_missing_setting_is_named_and_is_a_usage_error() {
    let told = run(&["serve", "--check-config"], &[]);
    assert_eq!(told.status.code(), Some(2));
    assert!(text(&told.stderr).contains("DATABASE_URL is not set"), "{}", text(&told.stderr));
    assert!(text(&told.stderr).contains("hint:"));
}

#[test]
fn a_broker_without_tokens_is_refused_on_any_address_but_loopback() {
    for (listen, code) in [("0.0.0.0:8080", 2), ("[::]:8080", 2), ("127.0.0.1:8080", 0), ("[::1]:8080", 0)] {
        let environment = [SERVERS[0], SERVERS[1], ("LFS_BROKER_AUTH_MODE", "none"), ("LFS_BROKER_LISTEN", listen)];
        let told = run(&["serve", "--check-config"], &environment);
        assert_eq!(told.status.code(), Some(code), "{listen}: {}", text(&told.stderr));
    }
}

#[test]
fn tokens_need_a_key_an_issuer_and_an_audience() {
    let told = |more: &[(&str, &str)]| {
        let environment: Vec<(&str, &str)> = SERVERS.iter().chain(more).copied().collect();
        let output = run(&["serve", "--check-config"], &environment);
        (output.status.code(), text(&output.stderr))
    };
    let secret = ("LFS_BROKER_JWT_HS256_SECRET", "0123456789abcdef0123456789abcdef");
    let (issuer, audience) = (("LFS_BROKER_JWT_ISSUER", "i"), ("LFS_BROKER_JWT_AUDIENCE", "a"));
    assert!(told(&[]).1.contains("LFS_BROKER_JWT_HS256_SECRET"));
    assert!(told(&[("LFS_BROKER_JWT_HS256_SECRET", "short"), issuer, audience]).1.contains("at least 32"));
    assert!(told(&[secret]).1.contains("LFS_BROKER_JWT_ISSUER"));
    assert_eq!(told(&[secret, issuer, audience]).0, Some(0));
}

#[test]
fn a_database_that_does_not_answer_is_an_error() {
    let told = run(&["migrate"], &[("DATABASE_URL", "postgres://u:p@127.0.0.1:1/x")]);
    assert_eq!(told.status.code(), Some(1));
    assert!(text(&told.stderr).starts_with("error:"), "{}", text(&told.stderr));
}

#[test]
fn the_contract_and_completions_go_to_stdout() {
    let contract: Value = serde_json::from_slice(&run(&["openapi"], &[]).stdout).unwrap();
    assert!(contract["openapi"].as_str().unwrap().starts_with("3.1"));
    assert!(text(&run(&["completions", "bash"], &[]).stdout).contains("complete -F"));
    assert_eq!(run(&["nonsense"], &[]).status.code(), Some(2));
}

#[tokio::test]
async fn policies_are_set_read_listed_and_deleted() {
    let house = House::new().await;
    let url = house.url();
    let environment = [("LFS_BROKER_URL", url.as_str())];
    let set = run_aside(&["topics", "set", "videos", r#"{"max_bytes": 7}"#], &environment).await;
    assert_eq!(set.status.code(), Some(0), "{}", text(&set.stderr));
    let got: Value = serde_json::from_slice(&run_aside(&["topics", "get", "videos"], &environment).await.stdout).unwrap();
    assert_eq!((&got["max_bytes"], &got["enabled"]), (&7.into(), &true.into()));
    let listed = text(&run_aside(&["topics", "list"], &environment).await.stdout);
    assert!(listed.lines().any(|line| line.contains(r#""topic":"videos""#)), "{listed}");
    assert_eq!(run_aside(&["topics", "delete", "videos"], &environment).await.status.code(), Some(0));
    let gone = run_aside(&["topics", "get", "videos"], &environment).await;
    assert_eq!(gone.status.code(), Some(3), "refused by the broker: {}", text(&gone.stderr));
    let wrong = run_aside(&["topics", "set", "videos", r#"{"max_byte": 7}"#], &environment).await;
    assert_eq!(wrong.status.code(), Some(3), "{}", text(&wrong.stderr));
}

#[tokio::test]
async fn an_unreachable_broker_is_exit_code_5() {
    let told = run_aside(&["topics", "list", "--broker", "http://127.0.0.1:1"], &[]).await;
    assert_eq!(told.status.code(), Some(5), "{}", text(&told.stderr));
    assert!(text(&told.stderr).contains("hint:"));
}

#[tokio::test]
async fn what_is_put_is_got_back_by_its_pointer() {
    let house = House::new().await;
    let url = house.url();
    let environment = [("LFS_BROKER_URL", url.as_str())];
    let directory = tempfile::tempdir().unwrap();
    let (file, back) = (directory.path().join("a.bin"), directory.path().join("b.bin"));
    let content = bytes(100_000, 1);
    std::fs::write(&file, &content).unwrap();
    let put = ["put", file.to_str().unwrap(), "--topic", &house.topic, "--key", "k", "--header", "trace=abc", "--wait"];
    let put = run_aside(&put, &environment).await;
    assert_eq!(put.status.code(), Some(0), "{}", text(&put.stderr));
    let done: Value = serde_json::from_slice(&put.stdout).expect("complete's answer on stdout");
    assert_eq!(done["state"], "published");
    let records = house.records(&house.topic).await;
    assert_eq!(records[0].key.as_deref(), Some(b"k".as_slice()));
    assert!(records[0].headers.contains(&("trace".to_owned(), "abc".to_owned())));

    let got = run_aside_with(&["get"], &environment, &records[0].value).await;
    assert!(got.stdout == content, "{}", text(&got.stderr));
    let id = done["id"].as_str().unwrap();
    let got = run_aside(&["get", "--upload", id, "--output", back.to_str().unwrap()], &environment).await;
    assert_eq!(got.status.code(), Some(0), "{}", text(&got.stderr));
    assert!(std::fs::read(&back).unwrap() == content && got.stdout.is_empty());

    let piped = run_aside_with(&["put", "-", "--topic", &house.topic, "--json"], &environment, b"from a pipe").await;
    assert_eq!((piped.status.code(), piped.stderr.as_slice()), (Some(0), b"".as_slice()));
    let refused = run_aside_with(&["put", "-", "--topic", "no/topic"], &environment, b"x").await;
    assert_eq!(refused.status.code(), Some(3), "{}", text(&refused.stderr));
    let no_pointer = run_aside_with(&["get"], &environment, b"data").await;
    assert_ne!(no_pointer.status.code(), Some(0));
}

#[tokio::test]
async fn of_many_files_each_is_put_and_one_that_cannot_be_stops_no_other() {
    let house = House::new().await;
    let url = house.url();
    let environment = [("LFS_BROKER_URL", url.as_str())];
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    for (name, content) in [("a", "first"), ("it's b", "second")] {
        std::fs::write(path(name), content).unwrap();
    }
    let files = [path("a"), path("missing"), path("it's b"), "-".to_owned()];
    let mut arguments = vec!["put", "--topic", &house.topic, "--wait"];
    arguments.extend(files.iter().map(String::as_str));
    let told = run_aside_with(&arguments, &environment, b"third").await;
    let words = text(&told.stderr);
    assert_eq!(told.status.code(), Some(1), "{words}");
    assert!(words.contains(&format!("error: {}: ", files[1])), "{words}");
    assert!(words.ends_with("error: 1 of 4 files were not uploaded\n"), "{words}");
    let states: Vec<Value> = text(&told.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let sizes: Vec<_> = states.iter().map(|line| line["pointer"]["size"].as_u64()).collect();
    assert_eq!(sizes, [Some(5), Some(6), Some(5)], "a line a file, in order");
    assert_eq!(house.records(&house.topic).await.len(), 3);

    // Small files are put all the same; the policy's advice is told, and not to machines.
    assert!(words.contains(&format!("{} has 5 bytes, and {} advises uploads from 8388608 on", files[0], house.topic)), "{words}");
    let told = run_aside(&["put", &files[0], "--topic", &house.topic, "--json"], &environment).await;
    assert_eq!(text(&told.stderr), "");

    // What another file would meet as well ends it, and says what is left.
    let told = run_aside(&["put", &files[0], &files[2], "--topic", "no/topic"], &environment).await;
    assert_eq!(told.status.code(), Some(3), "{}", text(&told.stderr));
    let told = run_aside(&["put", &files[0], &files[2], "--topic", "not-there"], &environment).await;
    let words = text(&told.stderr);
    assert_eq!(told.status.code(), Some(3), "{words}");
    assert!(words.contains(&format!("note: not begun: '{}", directory.path().display())), "{words}");
    let told = run_aside(&["put", &files[0], &files[2], "--topic", "x", "--broker", "http://127.0.0.1:1"], &[]).await;
    assert_eq!(told.status.code(), Some(5), "{}", text(&told.stderr));
}

/// Puts a file into storage that stands still, and asks to end once the upload is open. Gives its id and what was said.
async fn interrupted(house: &House, file: &Path) -> (String, Output) {
    let (id, child) = held_up(house, &[file.to_str().unwrap(), "--wait"], Path::new(".")).await;
    (id, interrupt(child).await)
}

/// A put that has opened its upload, and stands still. Gives the upload's id.
async fn held_up(house: &House, arguments: &[&str], directory: &Path) -> (String, Child) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lfs-broker"));
    command.args(["put", "--topic", &house.topic]).args(arguments).current_dir(directory);
    command.env_clear().env("LFS_BROKER_URL", house.url());
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let open = async || house.get("/lfs/uploads?state=open").await.json["items"].clone();
    house.eventually("the upload is open", async || open().await[0].is_object()).await;
    (open().await[0]["id"].as_str().unwrap().to_owned(), child)
}

/// Asks a command to end, as Ctrl-C does. Gives what it said; it calls that a failure.
async fn interrupt(child: Child) -> Output {
    signal(child.id(), "INT");
    let told = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap()).await.unwrap();
    assert_eq!(told.status.code(), Some(1), "{}", text(&told.stderr));
    told
}

#[tokio::test]
async fn an_interrupted_put_says_how_to_go_on_and_goes_on_there() {
    let (house, wire) = clients_behind_s3(|settings| settings.policy.single_put_max_bytes = PART as u64).await;
    wire.silence();
    let directory = tempfile::tempdir().unwrap();
    let (large, small) = (directory.path().join("it's large"), directory.path().join("small"));
    let content = bytes(3 * PART + 1, 4);
    std::fs::write(&large, &content).unwrap();
    std::fs::write(&small, b"small").unwrap();

    let (id, told) = interrupted(&house, &large).await;
    let words = text(&told.stderr);
    let hint = words.lines().find_map(|line| line.strip_prefix("hint: go on with: lfs-broker ")).expect(&words);
    assert!(hint.contains(&format!("--resume {id} --wait")), "{hint}");
    wire.restore().await;
    // As a shell reads it.
    let line = format!("{} {hint}", env!("CARGO_BIN_EXE_lfs-broker"));
    let told = tokio::task::spawn_blocking(move || Command::new("sh").args(["-c", &line]).output().unwrap()).await.unwrap();
    assert_eq!(told.status.code(), Some(0), "{}", text(&told.stderr));
    assert!(house.only_record().await.1 == content);

    // A single PUT cannot be gone on with: nothing of it stays.
    wire.silence();
    let (id, told) = interrupted(&house, &small).await;
    assert!(text(&told.stderr).contains(&format!("interrupted: upload {id} was aborted")), "{}", text(&told.stderr));
    assert_eq!(house.upload(&id).await.state(), "aborted");
}

#[tokio::test]
async fn get_replaces_files_and_what_links_lead_to_and_never_a_pipe() {
    let house = House::new().await;
    let url = house.url();
    let environment = [("LFS_BROKER_URL", url.as_str())];
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    house.publish(b"hello", serde_json::json!({})).await;
    let value = house.only_record().await.0.value;
    // What a killed command left is nobody's.
    std::fs::write(path(".lfs-download-dead"), b"half").unwrap();
    std::fs::write(path("file"), b"before").unwrap();
    std::os::unix::fs::symlink(path("file"), path("link")).unwrap();
    let got = run_aside_with(&["get", "--output", path("link").to_str().unwrap(), "--json"], &environment, &value).await;
    assert_eq!(got.status.code(), Some(0), "{}", text(&got.stderr));
    assert!(path("link").is_symlink());
    assert_eq!(std::fs::read(path("file")).unwrap(), b"hello");
    let told: Value = serde_json::from_slice(&got.stdout).unwrap();
    assert_eq!((&told["size"], &told["integrity"], told.get("verified")), (&5.into(), &"sha256".into(), None));

    let pipe = path("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let reader = Command::new("cat").arg(&pipe).stdout(Stdio::piped()).spawn().unwrap();
    let got = run_aside_with(&["get", "--output", pipe.to_str().unwrap()], &environment, &value).await;
    assert_eq!(got.status.code(), Some(0), "{}", text(&got.stderr));
    assert_eq!(reader.wait_with_output().unwrap().stdout, b"hello");
    let mut left: Vec<_> = std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["file", "link", "pipe"]);
}

#[tokio::test]
async fn an_interrupted_get_leaves_nothing() {
    let (house, wire) = clients_behind_s3(|_| {}).await;
    let id = house.publish(b"hello", serde_json::json!({})).await.id();
    wire.silence();
    let directory = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_lfs-broker"));
    command.args(["get", "--upload", &id, "--output"]).arg(directory.path().join("a"));
    command.env_clear().env("LFS_BROKER_URL", house.url()).stdin(Stdio::null()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    // Its connection stands, so it waits for bytes.
    wire.is_met().await;
    let told = interrupt(child).await;
    assert!(text(&told.stderr).contains("interrupted: nothing was written"), "{}", text(&told.stderr));
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn a_token_opens_what_it_names_and_nothing_else() {
    let secret = "0123456789abcdef0123456789abcdef";
    let house = House::with(|settings| {
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
    let url = house.url();
    for (topic, code) in [(house.topic.as_str(), 0), ("another", 3)] {
        let token = run(&["token", "--tenant", "acme", "--scope", "lfs:write lfs:read", "--topic", topic, "--ttl", "60"], &keys);
        assert_eq!(token.status.code(), Some(0), "{}", text(&token.stderr));
        let token = text(&token.stdout);
        let environment = [("LFS_BROKER_URL", url.as_str()), ("LFS_BROKER_TOKEN", token.trim())];
        let put = run_aside_with(&["put", "-", "--topic", &house.topic], &environment, b"x").await;
        assert_eq!(put.status.code(), Some(code), "{}", text(&put.stderr));
    }
    let nobody = run_aside_with(&["put", "-", "--topic", &house.topic], &[("LFS_BROKER_URL", url.as_str())], b"x").await;
    assert_eq!(nobody.status.code(), Some(3), "{}", text(&nobody.stderr));
    let reader = run(&["token", "--tenant", "acme", "--scope", "lfs:read", "--topic", &house.topic], &keys);
    let reader = text(&reader.stdout);
    let environment = [("LFS_BROKER_URL", url.as_str()), ("LFS_BROKER_TOKEN", reader.trim())];
    let refused = run_aside_with(&["put", "-", "--topic", &house.topic], &environment, b"x").await;
    assert!(text(&refused.stderr).contains("needs lfs:write"), "{}", text(&refused.stderr));
    let tenant: String = sqlx::query_scalar("select distinct tenant from upload_sessions").fetch_one(&house.db).await.unwrap();
    assert_eq!(tenant, "acme");
}
