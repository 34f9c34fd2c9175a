//! Wrong usage and wrong settings exit with code 2 before the command does anything.

use std::io::Write as _;

use super::{UNREACHABLE_SERVERS, run, run_with_input, text};

type Arguments = &'static [&'static str];
type Environment = &'static [(&'static str, &'static str)];

const SECRET: &str = "0123456789abcdef0123456789abcdef";
const TOKENS: [(&str, &str); 3] =
    [("LFS_BROKER_JWT_HS256_SECRET", SECRET), ("LFS_BROKER_JWT_ISSUER", "i"), ("LFS_BROKER_JWT_AUDIENCE", "a")];

/// Runs `serve --check-config` with valid settings and these changes.
fn check(more: &[(&str, &str)]) -> (Option<i32>, String) {
    let environment: Vec<(&str, &str)> = UNREACHABLE_SERVERS.iter().chain(&TOKENS).chain(more).copied().collect();
    let output = run(&["serve", "--check-config"], &environment);
    (output.status.code(), text(&output.stderr))
}

#[test]
fn invalid_arguments_are_exit_code_2() {
    let cases: [(Arguments, Environment); 11] = [
        (&["topics", "list", "--broker", "nonsense"], &[]),
        (&["topics", "list"], &[("LFS_BROKER_URL", "")]),
        (&["topics", "list", "--token", "a\nb"], &[]),
        (&["topics", "set", "t", "x"], &[]),
        (&["token", "--tenant", "Bad Tenant", "--scope", "lfs:read"], &TOKENS),
        (&["token", "--tenant", "acme", "--scope", "lfs:read", "--topic", "vid*eos"], &TOKENS),
        (&["consume", "--topic", "t", "--dir", "d", "--group", ""], &UNREACHABLE_SERVERS),
        (&["consume", "--topic", "t", "--dir", "d"], &[]),
        (&["put", "a", "--topic", "t", "--header", "a=1", "--header", "a=2"], &[]),
        (&["migrate"], &[("DATABASE_URL", "nonsense")]),
        (&["consume", "--topic", "t", "--dir", "d", "--reference-bucket", "b"], &[("AWS_ENDPOINT_URL_S3", "nonsense")]),
    ];
    for (arguments, environment) in cases {
        let output = run(arguments, environment);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", text(&output.stderr));
    }
}

#[test]
fn invalid_settings_are_exit_code_2() {
    let file = |text: &str| {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    };
    let property = file("[kafka.properties]\n'no.such.property' = 'x'\n");
    assert_eq!(check(&[]).0, Some(0));
    for (name, value) in [
        ("LFS_BROKER_LISTEN", "x"),
        ("DATABASE_URL", "nonsense"),
        ("LFS_BROKER_JWT_HS256_SECRET", "short"),
        ("LFS_BROKER_CONFIG", property.path().to_str().unwrap()),
        ("LFS_BROKER_JWT_JWKS_URL", "nonsense"),
    ] {
        let (code, output) = check(&[(name, value)]);
        assert_eq!(code, Some(2), "{name}={value}: {output}");
    }
    let (code, output) = check(&[("LFS_BROKER_TLS_CERTIFICATE_FILE", "/no/c"), ("LFS_BROKER_TLS_KEY_FILE", "/no/k")]);
    assert_eq!(code, Some(2), "{output}");
}

#[test]
fn settings_that_s3_would_refuse_are_exit_code_2() {
    for (name, value) in [
        ("LFS_BROKER_S3_SIGNING_ACCESS_KEY_ID", "AKID"),
        ("LFS_BROKER_S3_SIGNING_SECRET_ACCESS_KEY", "hush"),
        ("LFS_BROKER_S3_PUBLIC_ENDPOINT", "nonsense"),
        ("AWS_ENDPOINT_URL_S3", "nonsense"),
        ("LFS_BROKER_SINGLE_PUT_MAX_BYTES", "5368709121"),
        ("LFS_BROKER_PART_SIZE_BYTES", "5368709121"),
        ("LFS_BROKER_PART_SIZE_BYTES", "1"),
        ("LFS_BROKER_URL_SECONDS", "604801"),
        ("LFS_BROKER_SESSION_SECONDS", "604801"),
        ("LFS_BROKER_SESSION_MAX_SECONDS", "604801"),
    ] {
        let (code, output) = check(&[(name, value)]);
        assert_eq!(code, Some(2), "{name}={value}: {output}");
        assert!(
            output.contains(name.rsplit("S3_").next().unwrap()) || output.contains("AWS_ENDPOINT_URL_S3"),
            "{name}: {output}"
        );
        assert!(!output.contains("hush"), "{output}");
    }
    for valid in [
        ("LFS_BROKER_S3_PUBLIC_ENDPOINT", "https://s3.example.net/base"),
        ("AWS_ENDPOINT_URL_S3", "http://[::1]:9000"),
        ("LFS_BROKER_PART_SIZE_BYTES", "5242880"),
        ("LFS_BROKER_SINGLE_PUT_MAX_BYTES", "5368709120"),
        ("LFS_BROKER_URL_SECONDS", "604800"),
    ] {
        assert_eq!(check(&[valid]).0, Some(0), "{valid:?}: {}", check(&[valid]).1);
    }
}

#[test]
fn a_token_without_settings_names_all_that_it_needs_and_prints_no_note() {
    let output = run(&["token", "--tenant", "acme", "--scope", "lfs:read"], &[]);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.starts_with("error: ") && !stderr.contains("note:"), "{stderr}");
    for (name, _) in TOKENS {
        assert!(stderr.contains(&format!("{name} is not set")), "{stderr}");
    }
}

#[test]
fn two_pointers_on_standard_input_are_an_error_that_says_more_than_one() {
    let line = r#"{"kfs_lfs":1,"bucket":"b","key":"k","size":1,"sha256":"x"}"#;
    for input in [format!("{line}\n{line}\n"), format!("{{\"pointer\":{line}}}\n{{\"pointer\":{line}}}\n")] {
        let output = run_with_input(&["get"], &[], input.as_bytes());
        assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
        assert!(text(&output.stderr).contains("more than one"), "{}", text(&output.stderr));
    }
}
