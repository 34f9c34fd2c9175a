//! The command line: exit codes, hints, and what is printed where.

use std::io::Write as _;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

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
    for (listen, code) in [("0.0.0.0:8080", 1), ("[::]:8080", 1), ("127.0.0.1:8080", 0), ("[::1]:8080", 0)] {
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
    let tenant: String = sqlx::query_scalar("select distinct tenant from upload_sessions").fetch_one(&house.db).await.unwrap();
    assert_eq!(tenant, "acme");
}
