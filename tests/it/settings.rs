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

#[test]
fn addresses_and_names_that_cannot_work_are_refused() {
    let check = |name: &'static str, value: &'static str| {
        let others = VALID.into_iter().filter(|(other, _)| *other != name);
        run(&["serve", "--check-config"], &others.chain([(name, value)]).collect::<Vec<_>>())
    };
    for (name, value, expected) in [
        ("DATABASE_URL", "mysql://x", "postgres://USER:PASSWORD@HOST:5432/DATABASE"),
        ("KAFKA_BOOTSTRAP_SERVERS", "http://foo:9092", "HOST:PORT, or several separated by commas"),
        ("KAFKA_BOOTSTRAP_SERVERS", "k:9092,https://foo", "HOST:PORT, or several separated by commas"),
        ("LFS_BROKER_S3_BUCKET", "my bucket", "the name of a bucket, without spaces and slashes"),
        ("LFS_BROKER_S3_BUCKET", "bucket/prefix", "the name of a bucket, without spaces and slashes"),
    ] {
        let (code, message) = check(name, value);
        assert_eq!(code, Some(2), "{name}={value}: {message}");
        assert!(message.contains(name) && message.contains(expected), "{name}={value}: {message}");
    }
    for (name, value) in [
        ("DATABASE_URL", "postgresql://u@127.0.0.1/x"),
        ("KAFKA_BOOTSTRAP_SERVERS", "PLAINTEXT://k1:9092, k2"),
        ("KAFKA_BOOTSTRAP_SERVERS", "[::1]:9092"),
        ("LFS_BROKER_S3_BUCKET", "arn:aws:s3:eu-central-1:123456789012:accesspoint/uploads"),
        ("LFS_BROKER_S3_BUCKET", "My_Bucket.2"),
    ] {
        assert_eq!(check(name, value).0, Some(0), "{name}={value}: {}", check(name, value).1);
    }
}
