//! The command line: exit codes, hints, and what is printed where.

use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::harness::House;

fn run(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lfs-broker"));
    command.args(arguments).env_clear().envs(environment.iter().copied()).stdin(Stdio::null());
    command.output().expect("the program starts")
}

async fn run_aside(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let arguments: Vec<String> = arguments.iter().map(ToString::to_string).collect();
    let environment: Vec<(String, String)> = environment.iter().map(|(a, b)| (a.to_string(), b.to_string())).collect();
    let work = move || {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let environment: Vec<(&str, &str)> = environment.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
        run(&arguments, &environment)
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
