//! Wrong settings stop `serve --check-config` with exit code 2 and an error that names each of them.

use std::process::{Command, Stdio};

/// Runs a command with only these variables. Returns its exit code and its messages.
fn run(arguments: &[&str], environment: &[(&str, &str)]) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lfs-broker"));
    command.args(arguments).env_clear().envs(environment.iter().copied()).stdin(Stdio::null());
    let output = command.output().expect("the program starts");
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

const VALID: [(&str, &str); 3] = [
    ("DATABASE_URL", "postgres://u:p@127.0.0.1:1/x"),
    ("KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:1"),
    ("LFS_BROKER_AUTH_MODE", "none"),
];

#[test]
fn a_misspelled_variable_is_refused_with_the_right_name() {
    let check = |more: &[(&str, &str)]| run(&["serve", "--check-config"], &[VALID.as_slice(), more].concat());
    assert_eq!(check(&[]).0, Some(0));
    let (code, message) = check(&[("LFS_BROKER_CORS_ORIGIN", "*"), ("LFS_BROKER_BUCKET", "lfs")]);
    assert_eq!(code, Some(2), "{message}");
    assert!(message.contains("LFS_BROKER_CORS_ORIGIN; did you mean LFS_BROKER_CORS_ORIGINS?"), "{message}");
    assert!(message.contains("LFS_BROKER_BUCKET; did you mean LFS_BROKER_S3_BUCKET?"), "{message}");
    assert!(message.contains("hint: docs/configuration.md"), "{message}");
    let others = [("LFS_BROKER_URL", "http://x"), ("LFS_BROKER_TOKEN", "x"), ("LFS_BROKER_LOG_FORMAT", "json")];
    assert_eq!(check(&others), check(&[]), "the variables of the client commands are accepted");
    // Other commands read the settings too.
    assert_eq!(run(&["migrate"], &[VALID[0], ("LFS_BROKER_LISTN", "x")]).0, Some(2));
}

#[test]
fn a_first_start_without_settings_names_all_that_are_needed() {
    let (code, message) = run(&["serve", "--check-config"], &[]);
    assert_eq!(code, Some(2), "{message}");
    for name in ["DATABASE_URL", "KAFKA_BOOTSTRAP_SERVERS", "LFS_BROKER_JWT_HS256_SECRET", "LFS_BROKER_JWT_ISSUER"] {
        assert!(message.contains(name), "{name}: {message}");
    }
    let (code, message) = run(&["serve", "--check-config"], &VALID[..2]);
    assert_eq!(code, Some(2), "{message}");
    for name in ["LFS_BROKER_JWT_HS256_SECRET", "LFS_BROKER_JWT_ISSUER", "LFS_BROKER_JWT_AUDIENCE"] {
        assert!(message.contains(name), "{name}: {message}");
    }
}
