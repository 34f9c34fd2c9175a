//! Settings: which values are accepted, and how errors name the setting.

use super::*;
use proptest::prelude::*;

fn with(pairs: &[(&str, &str)]) -> Result<app::Settings, Error> {
    let pairs: BTreeMap<String, String> = pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    load(None, |name| pairs.get(name).cloned())
}

const REQUIRED: [(&str, &str); 2] = [("DATABASE_URL", "postgres://x/y"), ("KAFKA_BOOTSTRAP_SERVERS", "k:9092")];

#[test]
fn defaults_match_the_documentation() {
    let settings = with(&REQUIRED).unwrap();
    assert_eq!(settings.listen.to_string(), "127.0.0.1:8080");
    assert_eq!(settings.auth.mode, auth::Mode::Jwt);
    assert!(!settings.policy.default_enabled);
    assert_eq!((settings.policy.single_put_max_bytes, settings.policy.part_size_bytes), (64 << 20, 16 << 20));
    assert_eq!(settings.broker.complete_wait.as_secs(), 5);
    assert_eq!(settings.store.tenant_connections, 5);
    let fewer = with(&[REQUIRED[0], REQUIRED[1], ("LFS_BROKER_TENANT_CONNECTIONS", "2")]).unwrap();
    assert_eq!(fewer.store.tenant_connections, 2);
    assert_eq!(settings.kafka.delivery, Delivery::ExactlyOnce);
}

#[test]
fn the_environment_overrides_the_file_and_errors_name_the_setting() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(
        file.path(),
        "listen = '127.0.0.1:1'\n[s3]\nbucket = 'file'\n[kafka.properties]\n'security.protocol' = 'ssl'\n",
    )
    .unwrap();
    let environment = |name: &str| match name {
        "LFS_BROKER_S3_BUCKET" => Some("environment".to_owned()),
        _ => REQUIRED.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()),
    };
    let settings = load(Some(file.path()), environment).unwrap();
    assert_eq!(settings.objects.bucket.as_deref(), Some("environment"));
    assert_eq!(settings.listen.port(), 1);
    assert_eq!(settings.kafka.properties["security.protocol"], "ssl");

    std::fs::write(file.path(), "lisen = 'x'\n").unwrap();
    assert!(load(Some(file.path()), environment).err().unwrap().to_string().contains("lisen"));
    let message = |extra: (&str, &str)| with(&[REQUIRED[0], REQUIRED[1], extra]).err().unwrap().to_string();
    assert!(message(("LFS_BROKER_URL_SECONDS", "0")).contains("LFS_BROKER_URL_SECONDS"));
    assert!(message(("LFS_BROKER_LEASE_SECONDS", "x")).contains("LFS_BROKER_LEASE_SECONDS"));
    assert!(message(("LFS_BROKER_AUTH_MODE", "maybe")).contains("maybe"));
    assert!(with(&[]).err().unwrap().to_string().contains("DATABASE_URL"));
}

#[test]
fn http_settings_are_validated() {
    let more = |extra: &[(&str, &str)]| with(&[REQUIRED.as_slice(), extra].concat());
    let http = more(&[]).unwrap().http;
    assert_eq!((http.connections, http.tenant_requests_per_second, http.failed_logins_per_minute), (4096, 1000, 600));
    assert_eq!(
        [http.header_timeout, http.body_timeout, http.request_timeout, http.idle_timeout].map(|time| time.as_secs()),
        [10, 10, 60, 75]
    );
    assert_eq!((http.connections_per_address, http.tenant_long_polls, http.body_memory_bytes), (2048, 1024, 64 << 20));
    assert_eq!((http.shutdown_delay.as_secs(), http.shutdown_grace.as_secs()), (5, 20));
    let fewer = more(&[("LFS_BROKER_CONNECTIONS", "1000")]).unwrap().http;
    assert_eq!(
        (fewer.connections_per_address, fewer.tenant_long_polls),
        (500, 250),
        "the defaults are shares of the connections"
    );
    assert!(http.tls.is_none() && http.trusted_proxies.is_empty());
    let settings = more(&[
        ("LFS_BROKER_TLS_CERTIFICATE_FILE", "/c"),
        ("LFS_BROKER_TLS_KEY_FILE", "/k"),
        ("LFS_BROKER_TRUSTED_PROXIES", "10.0.0.0/8, 192.0.2.1,2001:db8::/32,"),
        ("LFS_BROKER_TENANT_REQUESTS_PER_SECOND", "0"),
        ("LFS_BROKER_CORS_ORIGINS", "https://a.example, http://localhost:3000"),
        ("LFS_BROKER_PUBLIC_URL", "https://lfs.example/base/"),
    ]);
    let settings = settings.unwrap();
    assert_eq!(settings.http.tls.unwrap().key_file, PathBuf::from("/k"));
    let nets: Vec<String> = settings.http.trusted_proxies.iter().map(ToString::to_string).collect();
    assert_eq!(nets, ["10.0.0.0/8", "192.0.2.1/32", "2001:db8::/32"]);
    assert_eq!((settings.http.tenant_requests_per_second, settings.cors_origins.len()), (0, 2));
    for (name, value) in [
        ("LFS_BROKER_TLS_KEY_FILE", "/k"),
        ("LFS_BROKER_TLS_CERTIFICATE_FILE", "/c"),
        ("LFS_BROKER_TRUSTED_PROXIES", "10.0.0.0/33"),
        ("LFS_BROKER_TRUSTED_PROXIES", "proxy.example"),
        ("LFS_BROKER_CONNECTIONS", "0"),
        ("LFS_BROKER_CONCURRENT_COMPLETES", "0"),
        ("LFS_BROKER_BODY_MEMORY_BYTES", "1000"),
        ("LFS_BROKER_CONNECTIONS_PER_ADDRESS", "-1"),
        ("LFS_BROKER_TENANT_LONG_POLLS", "many"),
        ("LFS_BROKER_SHUTDOWN_DELAY_SECONDS", "soon"),
        ("LFS_BROKER_SHUTDOWN_GRACE_SECONDS", "-1"),
        ("LFS_BROKER_HEADER_SECONDS", "0"),
        ("LFS_BROKER_BODY_SECONDS", "-1"),
        ("LFS_BROKER_IDLE_SECONDS", "soon"),
        ("LFS_BROKER_REQUEST_SECONDS", "30"),
        ("LFS_BROKER_COMPLETE_WAIT_SECONDS", "60"),
        ("LFS_BROKER_TENANT_REQUESTS_PER_SECOND", "-5"),
        ("LFS_BROKER_TENANT_REQUESTS_PER_SECOND", "4294967296"),
        ("LFS_BROKER_PUBLIC_URL", "lfs.example"),
        ("LFS_BROKER_PUBLIC_URL", "https://lfs.example/?a=1"),
        ("LFS_BROKER_PUBLIC_URL", "https://lfs.example\r\nx: y"),
        ("LFS_BROKER_CORS_ORIGINS", "https://a.example/"),
        ("LFS_BROKER_CORS_ORIGINS", "a.example"),
        ("LFS_BROKER_CORS_ORIGINS", "https://A.example"),
    ] {
        let message = more(&[(name, value)]).err().unwrap_or_else(|| panic!("{name}={value:?} is accepted")).to_string();
        let toml_path =
            SETTINGS.iter().find(|(setting, ..)| *setting == name).map(|(_, toml_path, _)| toml_path.rsplit('.').next().unwrap());
        let wanted = match name {
            "LFS_BROKER_TLS_KEY_FILE" => "LFS_BROKER_TLS_CERTIFICATE_FILE",
            "LFS_BROKER_TLS_CERTIFICATE_FILE" => "LFS_BROKER_TLS_KEY_FILE",
            "LFS_BROKER_COMPLETE_WAIT_SECONDS" => "LFS_BROKER_REQUEST_SECONDS",
            name => name,
        };
        assert!(message.contains(wanted) || message.contains(toml_path.unwrap()), "{name}={value:?}: {message}");
    }
}

#[test]
fn an_origin_that_no_browser_sends_is_refused_with_a_hint() {
    for (value, hint) in [
        ("https://A.example/x", "https://a.example"),
        ("https://a.example:443", "https://a.example"),
        ("https://bücher.example", "https://xn--bcher-kva.example"),
        ("https://*.a.example", "list each origin"),
        ("a.example", "such as https://"),
        ("null", "only *"),
    ] {
        let message = parse_origin(value).unwrap_err().to_string();
        assert!(message.contains("LFS_BROKER_CORS_ORIGINS") && message.contains(hint), "{message}");
    }
    for value in [
        "https://a.example/path",
        "https://a.example:443",
        "http://a.example:80",
        "https://*.a.example",
        "https://a.example:",
        "https://a.example:99999",
        "https://u@a.example",
        "https://bücher.example",
        "https://[0:0::1]",
        "https://127.1",
        "ftp://a.example",
        "null",
    ] {
        assert!(parse_origin(value).is_err(), "{value}");
    }
    for value in ["*", "https://a.example", "http://localhost:3000", "https://xn--bcher-kva.example:8443", "http://[::1]:1"] {
        assert_eq!(parse_origin(value).unwrap(), value);
    }
}

#[test]
fn a_broker_without_tokens_also_answers_under_its_public_name() {
    let more = |mode| {
        with(&[REQUIRED[0], REQUIRED[1], ("LFS_BROKER_AUTH_MODE", mode), ("LFS_BROKER_PUBLIC_URL", "https://lfs.example/b")])
    };
    assert_eq!(more("none").unwrap().http.allowed_hosts.unwrap().hosts, ["lfs.example"]);
    assert!(more("jwt").unwrap().http.allowed_hosts.is_none());
}

proptest! {
    #[test]
    fn no_number_setting_causes_a_panic(value in "[ -~]{0,24}", number in any::<i128>()) {
        for (name, _, value_kind) in SETTINGS.iter().filter(|(_, _, value_kind)| matches!(value_kind, ValueKind::Number)) {
            let is_valid = |text: &str| text.parse::<i64>().is_ok_and(|number| number >= 0);
            for text in [value.as_str(), &number.to_string()] {
                prop_assert_eq!(parse_value(name, text.to_owned(), *value_kind).is_ok(), is_valid(text));
                let _ = with(&[REQUIRED[0], REQUIRED[1], (name, text)]);
            }
        }
    }

    #[test]
    fn no_list_setting_causes_a_panic(value in "[ -~]{0,40}") {
        for name in ["LFS_BROKER_TRUSTED_PROXIES", "LFS_BROKER_CORS_ORIGINS", "LFS_BROKER_PUBLIC_URL"] {
            let _ = with(&[REQUIRED[0], REQUIRED[1], (name, &value)]);
        }
    }
}

#[test]
fn a_secret_can_come_from_a_file() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "from a file\n").unwrap();
    let path = file.path().display().to_string();
    let settings = with(&[REQUIRED[0], REQUIRED[1], ("LFS_BROKER_JWT_HS256_SECRET_FILE", &path)]).unwrap();
    assert_eq!(settings.auth.hs256_secret.as_deref(), Some("from a file"));
}

/// Loads settings from a file with this text.
fn from_file(text: &str) -> Result<app::Settings, Error> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    load(Some(file.path()), |name| REQUIRED.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()))
}

#[test]
fn an_error_in_the_file_names_the_place_and_never_shows_the_value() {
    for (text, named) in [
        ("[jwt]\nhs256_secret = hush", "line 2"),
        ("[jwt]\n\nhs256_secret = \"hush", "line 3"),
        ("[jwt]\nhs256_secret = 'hush' x", "line 2"),
        ("[jwt]\nhs256_secret 'hush'", "line 2"),
        ("[jwt]\nhs256_secret = \"\\hush\"", "line 2"),
        ("[s3]\nsecret_access_key = 4812948129", "s3.secret_access_key"),
        ("[jwt]\nhs256_secret = 4812948129", "jwt.hs256_secret"),
        ("jwt = 'hush'", "[jwt]"),
        ("[jwt]\nhs256_secret = ['hush']", "jwt.hs256_secret"),
        ("[s3]\nsigning_secret_access_key = 2026-11-21", "s3.signing_secret_access_key"),
    ] {
        let message = from_file(text).err().unwrap_or_else(|| panic!("{text} is accepted")).to_string();
        assert!(message.contains(named), "{text:?}: {message}");
        assert!(!["hush", "4812948129", "2026"].iter().any(|secret| message.contains(secret)), "{text:?}: {message}");
    }
}

#[test]
fn a_file_may_use_toml_arrays_and_bare_keys() {
    let settings = from_file(
        "trusted_proxies = ['10.0.0.0/8', '192.0.2.1']
         [cors]
         origins = ['https://a.example', 'https://b.example']
         [kafka.properties]
         security.protocol = 'SASL_SSL'
         'linger.ms' = 1
         socket.keepalive.enable = false
         'ssl.cipher.suites' = ['a', 'b']",
    )
    .unwrap();
    let properties: Vec<(&str, &str)> =
        settings.kafka.properties.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let wanted = [
        ("linger.ms", "1"),
        ("security.protocol", "SASL_SSL"),
        ("socket.keepalive.enable", "false"),
        ("ssl.cipher.suites", "a,b"),
    ];
    assert_eq!(properties, wanted);
    assert_eq!((settings.http.trusted_proxies.len(), settings.cors_origins.len()), (2, 2));
}

#[test]
fn the_example_file_in_the_readme_is_valid() {
    let readme = include_str!("../README.md");
    let (_, rest) = readme.split_once("```toml\n").expect("the README has an example");
    let (example, _) = rest.split_once("```").unwrap();
    let settings = from_file(example).unwrap();
    assert_eq!(settings.objects.bucket.as_deref(), Some("lfs"));
    assert_eq!(settings.kafka.properties["security.protocol"], "SASL_SSL");
    assert_eq!((settings.cors_origins.len(), settings.policy.part_size_bytes), (1, 32 << 20));
    kafka::Kafka::connect(&settings.kafka).unwrap();
    settings.objects.check().unwrap();
    // The example shows every table.
    let toml_paths: Vec<&str> =
        SETTINGS.iter().map(|(_, toml_path, _)| *toml_path).chain(["s3.endpoint", "kafka.properties"]).collect();
    for table in toml_paths.iter().filter_map(|toml_path| toml_path.split_once('.')).map(|(table, _)| table) {
        assert!(example.contains(&format!("[{table}")), "{table}");
    }
}
