//! Settings: which values are accepted, and how errors name the setting.

use super::setting::Kind;
use super::*;
use crate::kafka::Delivery;
use crate::{broker, completion, policy, sweeper};
use proptest::prelude::*;

fn environment(pairs: &[(&str, &str)]) -> Environment {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn with(pairs: &[(&str, &str)]) -> Result<app::Settings, Error> {
    load(None, &environment(pairs))
}

const REQUIRED: [(&str, &str); 2] = [("DATABASE_URL", "postgres://x/y"), ("KAFKA_BOOTSTRAP_SERVERS", "k:9092")];

#[test]
fn a_broker_without_settings_has_the_documented_defaults() {
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
    let environment = environment(&[REQUIRED[0], REQUIRED[1], ("LFS_BROKER_S3_BUCKET", "environment")]);
    let settings = load(Some(file.path()), &environment).unwrap();
    assert_eq!(settings.objects.bucket.as_deref(), Some("environment"));
    assert_eq!(settings.listen.port(), 1);
    assert_eq!(settings.kafka.properties["security.protocol"], "ssl");

    std::fs::write(file.path(), "lisen = 'x'\n").unwrap();
    assert!(load(Some(file.path()), &environment).err().unwrap().to_string().contains("lisen"));
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
    assert_eq!(settings.http.tls.unwrap().key_file, Path::new("/k"));
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
        let wanted = match name {
            "LFS_BROKER_TLS_KEY_FILE" => "LFS_BROKER_TLS_CERTIFICATE_FILE",
            "LFS_BROKER_TLS_CERTIFICATE_FILE" => "LFS_BROKER_TLS_KEY_FILE",
            "LFS_BROKER_COMPLETE_WAIT_SECONDS" => "LFS_BROKER_REQUEST_SECONDS",
            name => name,
        };
        assert!(message.contains(wanted), "{name}={value:?}: {message}");
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
        for setting in table::settings() {
            let Kind::Number(range, _) = &setting.kind else { continue };
            let is_valid = |text: &str| text.parse::<u64>().is_ok_and(|number| range.contains(&number));
            for text in [value.as_str(), &number.to_string(), &range.start().to_string(), &range.end().to_string()] {
                prop_assert_eq!(setting.set(&mut Draft::default(), setting.variable, text).is_ok(), is_valid(text));
                let _ = with(&[REQUIRED[0], REQUIRED[1], (setting.variable, text)]);
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
    load(Some(file.path()), &environment(&REQUIRED))
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
fn the_example_file_in_the_documentation_is_valid() {
    let documentation = documentation();
    let (_, rest) = documentation.split_once("```toml\n").expect("the documentation has an example");
    let (example, _) = rest.split_once("```").unwrap();
    let settings = from_file(example).unwrap();
    assert_eq!(settings.objects.bucket.as_deref(), Some("lfs"));
    assert_eq!(settings.kafka.properties["security.protocol"], "SASL_SSL");
    assert_eq!((settings.cors_origins.len(), settings.policy.part_size_bytes), (1, 32 << 20));
    kafka::Kafka::connect(&settings.kafka).unwrap();
    settings.objects.check().unwrap();
    // The example shows every table.
    for (table, _) in table::settings().filter_map(|setting| setting.key.split_once('.')).chain([("kafka.properties", "")]) {
        assert!(example.contains(&format!("[{table}]")), "{table}");
    }
}

#[test]
fn the_documentation_is_generated_from_the_table() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/configuration.md");
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    if committed != documentation() {
        std::fs::write(&path, documentation()).unwrap();
        panic!("docs/configuration.md was not current and is written again: review and commit it");
    }
}

#[test]
fn every_default_is_that_of_the_module() {
    let settings = with(&REQUIRED).unwrap();
    let module_defaults = [
        format!("{:?}", http::Settings::default()),
        format!("{:?}", policy::Settings::default()),
        format!("{:?}", broker::Settings::default()),
        format!("{:?}", completion::Settings::default()),
        format!("{:?}", sweeper::Settings::default()),
        format!("{:?}", objects::Settings::default()),
    ];
    let loaded = [
        format!("{:?}", settings.http),
        format!("{:?}", settings.policy),
        format!("{:?}", settings.broker),
        format!("{:?}", settings.completion),
        format!("{:?}", settings.sweeper),
        format!("{:?}", settings.objects),
    ];
    assert_eq!(loaded, module_defaults);
    // The documentation shows a value for a setting only if the setting accepts that value.
    for setting in table::settings() {
        if let Some(value) = setting.default_value() {
            setting.set(&mut Draft::default(), setting.variable, &value).unwrap();
        }
    }
}

#[test]
fn every_setting_has_its_own_name_field_and_documentation() {
    let mut names = std::collections::BTreeSet::new();
    for setting in table::settings() {
        assert!(names.insert(setting.variable) && names.insert(setting.key), "{} stands twice", setting.variable);
        assert!(setting.doc.ends_with('.'), "{}", setting.variable);
        if setting.variable.starts_with("LFS_BROKER_") {
            assert_eq!(setting.variable, format!("LFS_BROKER_{}", setting.key.replace('.', "_").to_uppercase()));
        }
        // Another value than the default arrives in the field of this setting, and in no other field.
        let value = match &setting.kind {
            Kind::Number(range, _) => (range.start() + 7).to_string(),
            Kind::Flag => "true".to_owned(),
            Kind::Words(words) => words[1].to_owned(),
            Kind::Address => "192.0.2.1:1".to_owned(),
            Kind::Text | Kind::Secret | Kind::KafkaAddresses | Kind::Bucket | Kind::List => "text".to_owned(),
        };
        let mut draft = Draft::default();
        setting.set(&mut draft, setting.variable, &value).unwrap();
        assert_eq!((setting.field)(&mut draft).get(), Some(value), "{}", setting.variable);
        let changed = table::settings().filter(|other| (other.field)(&mut draft).get() != other.default_value());
        assert_eq!(changed.map(|other| other.variable).collect::<Vec<_>>(), [setting.variable]);
    }
}

#[test]
fn a_number_outside_its_range_is_refused_with_the_limit_and_the_value() {
    let message = |name, value| with(&[REQUIRED[0], REQUIRED[1], (name, value)]).err().unwrap().to_string();
    assert_eq!(
        message("LFS_BROKER_LEASE_SECONDS", "2"),
        "LFS_BROKER_LEASE_SECONDS is \"2\", but must be a whole number, 3 to 1000000000 seconds"
    );
    assert_eq!(
        message("LFS_BROKER_PART_SIZE_BYTES", "5242879"),
        "LFS_BROKER_PART_SIZE_BYTES is \"5242879\", but must be a whole number, 5242880 to 5368709120 bytes"
    );
    let largest = i64::MAX.to_string();
    let names = ["LFS_BROKER_TENANT_OPEN_SESSIONS", "LFS_BROKER_TENANT_RESERVED_BYTES"];
    let settings = with(&[REQUIRED[0], REQUIRED[1], (names[0], &largest), (names[1], &largest)]).unwrap();
    let quota = settings.broker.quota;
    assert_eq!((quota.open_sessions, quota.reserved_bytes), (i64::MAX, i64::MAX), "a quota may be as large as its column");
    for name in names {
        assert!(message(name, "9223372036854775808").contains("0 to 9223372036854775807"), "{name}");
    }
    let in_file = from_file("part_size_bytes = -1").err().unwrap().to_string();
    assert!(in_file.starts_with("part_size_bytes is \"-1\", but must be a whole number, 5242880 to"), "{in_file}");
}

#[test]
fn unknown_names_are_refused_with_the_nearest_setting() {
    for (name, nearest) in [
        ("LFS_BROKER_LISTN", "LFS_BROKER_LISTEN"),
        ("LFS_BROKER_BUCKET", "LFS_BROKER_S3_BUCKET"),
        ("LFS_BROKER_JWT_SECRET", "LFS_BROKER_JWT_HS256_SECRET"),
        ("LFS_BROKER_CORS_ORIGIN", "LFS_BROKER_CORS_ORIGINS"),
        ("LFS_BROKER_TOKENS", "LFS_BROKER_TOKEN"),
        ("LFS_BROKER_S3_BUCKT_FILE", "LFS_BROKER_S3_BUCKET"),
    ] {
        let message = with(&[REQUIRED[0], REQUIRED[1], (name, "hush")]).err().unwrap().to_string();
        assert_eq!(message, format!("there is no setting {name}; did you mean {nearest}?"));
    }
    let message = with(&[("LFS_BROKER_XYZ", ""), ("LFS_BROKER_LISTN", "")]).err().unwrap().to_string();
    assert!(message.contains("there is no setting LFS_BROKER_XYZ") && message.contains("LFS_BROKER_LISTEN"), "{message}");
    for name in ["LFS_BROKER_FOO", "LFS_BROKER_XYZ", "LFS_BROKER_SOMETHING_ELSE"] {
        let message = with(&[REQUIRED[0], REQUIRED[1], (name, "hush")]).err().unwrap().to_string();
        assert_eq!(message, format!("there is no setting {name}"), "no name is near");
    }
    for (text, nearest) in [
        ("bucket = 'hush'", "there is no setting bucket; did you mean s3.bucket?"),
        ("[s3]\nbuket = 'hush'", "there is no setting s3.buket; did you mean s3.bucket?"),
        ("[s4]", "there is no setting s4"),
        ("foo = 'hush'", "there is no setting foo"),
        ("[s3.bucket2.x]", "there is no setting s3.bucket2; did you mean s3.bucket?"),
    ] {
        let message = from_file(text).err().unwrap().to_string();
        assert!(message.starts_with(nearest) && !message.contains("hush"), "{text:?}: {message}");
    }
}

#[test]
fn variables_of_other_programs_and_of_the_command_line_are_accepted() {
    for (name, value) in [
        ("LFS_BROKER_URL", "http://127.0.0.1:8080"),
        ("LFS_BROKER_TOKEN", "x"),
        ("LFS_BROKER_LOG_FORMAT", "json"),
        ("LFS_BROKER_CONFIG", "/etc/lfs-broker.toml"),
        ("LFS_TEST_KAFKA", "x"),
        ("RUST_LOG", "debug"),
        // As Kubernetes sets them for a service with the name lfs-broker.
        ("LFS_BROKER_SERVICE_HOST", "10.0.0.1"),
        ("LFS_BROKER_SERVICE_PORT", "8080"),
        ("LFS_BROKER_SERVICE_PORT_HTTP", "8080"),
        ("LFS_BROKER_PORT", "tcp://10.0.0.1:8080"),
        ("LFS_BROKER_PORT_8080_TCP", "tcp://10.0.0.1:8080"),
        ("LFS_BROKER_PORT_8080_TCP_ADDR", "10.0.0.1"),
    ] {
        assert!(with(&[REQUIRED[0], REQUIRED[1], (name, value)]).is_ok(), "{name}");
    }
    assert!(with(&[REQUIRED[0], REQUIRED[1], ("LFS_BROKER_PORT", "8080")]).is_err(), "not from Kubernetes");
}

#[test]
fn missing_settings_are_reported_together() {
    let message = with(&[("LFS_BROKER_TLS_KEY_FILE", "/k")]).err().unwrap().to_string();
    for name in [
        "DATABASE_URL",
        "KAFKA_BOOTSTRAP_SERVERS",
        "LFS_BROKER_TLS_CERTIFICATE_FILE",
        "LFS_BROKER_JWT_HS256_SECRET",
        "LFS_BROKER_JWT_ISSUER",
        "LFS_BROKER_JWT_AUDIENCE",
    ] {
        assert!(message.contains(name), "{name}: {message}");
    }
    let without_tokens = with(&[REQUIRED[1], ("LFS_BROKER_AUTH_MODE", "none")]).err().unwrap().to_string();
    assert_eq!(without_tokens, "DATABASE_URL is not set");
}
