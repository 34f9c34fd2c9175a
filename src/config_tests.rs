//! Settings: what is taken, what is refused, and by which name.

use super::*;
use proptest::prelude::*;

fn with(pairs: &[(&str, &str)]) -> Result<app::Settings, Error> {
    let pairs: BTreeMap<String, String> = pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    load(None, |name| pairs.get(name).cloned())
}

const NEEDED: [(&str, &str); 2] = [("DATABASE_URL", "postgres://x/y"), ("KAFKA_BOOTSTRAP_SERVERS", "k:9092")];

#[test]
fn defaults_are_those_of_the_contract() {
    let settings = with(&NEEDED).unwrap();
    assert_eq!(settings.listen.to_string(), "127.0.0.1:8080");
    assert_eq!(settings.auth.mode, auth::Mode::Jwt);
    assert!(!settings.policy.default_enabled);
    assert_eq!((settings.policy.single_put_max_bytes, settings.policy.part_size_bytes), (64 << 20, 16 << 20));
    assert_eq!(settings.broker.complete_wait.as_secs(), 5);
    assert_eq!(settings.store.tenant_connections, 5);
    let fewer = with(&[NEEDED[0], NEEDED[1], ("LFS_BROKER_TENANT_CONNECTIONS", "2")]).unwrap();
    assert_eq!(fewer.store.tenant_connections, 2);
    assert_eq!(settings.kafka.delivery, Delivery::ExactlyOnce);
}

#[test]
fn the_environment_wins_over_the_file_and_mistakes_are_named() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(
        file.path(),
        "listen = '127.0.0.1:1'\n[s3]\nbucket = 'file'\n[kafka.properties]\n'security.protocol' = 'ssl'\n",
    )
    .unwrap();
    let environment = |name: &str| match name {
        "LFS_BROKER_S3_BUCKET" => Some("environment".to_owned()),
        _ => NEEDED.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()),
    };
    let settings = load(Some(file.path()), environment).unwrap();
    assert_eq!(settings.objects.bucket.as_deref(), Some("environment"));
    assert_eq!(settings.listen.port(), 1);
    assert_eq!(settings.kafka.properties["security.protocol"], "ssl");

    std::fs::write(file.path(), "lisen = 'x'\n").unwrap();
    assert!(load(Some(file.path()), environment).err().unwrap().to_string().contains("lisen"));
    let told = |extra: (&str, &str)| with(&[NEEDED[0], NEEDED[1], extra]).err().unwrap().to_string();
    assert!(told(("LFS_BROKER_URL_SECONDS", "0")).contains("LFS_BROKER_URL_SECONDS"));
    assert!(told(("LFS_BROKER_LEASE_SECONDS", "x")).contains("LFS_BROKER_LEASE_SECONDS"));
    assert!(told(("LFS_BROKER_AUTH_MODE", "maybe")).contains("maybe"));
    assert!(with(&[]).err().unwrap().to_string().contains("DATABASE_URL"));
}

#[test]
fn the_doors_settings_are_checked() {
    let more = |extra: &[(&str, &str)]| with(&[NEEDED.as_slice(), extra].concat());
    let door = more(&[]).unwrap().http;
    assert_eq!((door.connections, door.tenant_requests_per_second, door.failed_logins_per_minute), (4096, 1000, 600));
    assert_eq!(
        [door.header_time, door.body_time, door.request_time, door.idle_time].map(|time| time.as_secs()),
        [10, 10, 60, 75]
    );
    assert_eq!((door.connections_per_address, door.tenant_long_polls, door.body_memory_bytes), (2048, 1024, 64 << 20));
    assert_eq!((door.shutdown_delay.as_secs(), door.shutdown_grace.as_secs()), (5, 20));
    let fewer = more(&[("LFS_BROKER_CONNECTIONS", "1000")]).unwrap().http;
    assert_eq!((fewer.connections_per_address, fewer.tenant_long_polls), (500, 250), "shares of what there is");
    assert!(door.tls.is_none() && door.trusted_proxies.is_empty());
    let door = more(&[
        ("LFS_BROKER_TLS_CERTIFICATE_FILE", "/c"),
        ("LFS_BROKER_TLS_KEY_FILE", "/k"),
        ("LFS_BROKER_TRUSTED_PROXIES", "10.0.0.0/8, 192.0.2.1,2001:db8::/32,"),
        ("LFS_BROKER_TENANT_REQUESTS_PER_SECOND", "0"),
        ("LFS_BROKER_CORS_ORIGINS", "https://a.example, http://localhost:3000"),
        ("LFS_BROKER_PUBLIC_URL", "https://lfs.example/base/"),
    ]);
    let door = door.unwrap();
    assert_eq!(door.http.tls.unwrap().key_file, PathBuf::from("/k"));
    let nets: Vec<String> = door.http.trusted_proxies.iter().map(ToString::to_string).collect();
    assert_eq!(nets, ["10.0.0.0/8", "192.0.2.1/32", "2001:db8::/32"]);
    assert_eq!((door.http.tenant_requests_per_second, door.cors_origins.len()), (0, 2));
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
        let told = more(&[(name, value)]).err().unwrap_or_else(|| panic!("{name}={value:?} is taken")).to_string();
        let place = SETTINGS.iter().find(|(setting, ..)| *setting == name).map(|(_, place, _)| place.rsplit('.').next().unwrap());
        let wanted = match name {
            "LFS_BROKER_TLS_KEY_FILE" => "LFS_BROKER_TLS_CERTIFICATE_FILE",
            "LFS_BROKER_TLS_CERTIFICATE_FILE" => "LFS_BROKER_TLS_KEY_FILE",
            "LFS_BROKER_COMPLETE_WAIT_SECONDS" => "LFS_BROKER_REQUEST_SECONDS",
            name => name,
        };
        assert!(told.contains(wanted) || told.contains(place.unwrap()), "{name}={value:?}: {told}");
    }
}

#[test]
fn an_origin_that_no_browser_sends_is_refused_with_what_to_write() {
    for (value, hint) in [
        ("https://A.example/x", "https://a.example"),
        ("https://a.example:443", "https://a.example"),
        ("https://bücher.example", "https://xn--bcher-kva.example"),
        ("https://*.a.example", "list each origin"),
        ("a.example", "such as https://"),
        ("null", "* only"),
    ] {
        let told = origin(value).unwrap_err().to_string();
        assert!(told.contains("LFS_BROKER_CORS_ORIGINS") && told.contains(hint), "{told}");
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
        assert!(origin(value).is_err(), "{value}");
    }
    for value in ["*", "https://a.example", "http://localhost:3000", "https://xn--bcher-kva.example:8443", "http://[::1]:1"] {
        assert_eq!(origin(value).unwrap(), value);
    }
}

#[test]
fn a_broker_without_tokens_is_asked_under_its_public_name_too() {
    let more =
        |mode| with(&[NEEDED[0], NEEDED[1], ("LFS_BROKER_AUTH_MODE", mode), ("LFS_BROKER_PUBLIC_URL", "https://lfs.example/b")]);
    assert_eq!(more("none").unwrap().http.local.unwrap().hosts, ["lfs.example"]);
    assert!(more("jwt").unwrap().http.local.is_none());
}

proptest! {
    #[test]
    fn no_value_of_a_size_or_a_time_makes_it_panic(value in "[ -~]{0,24}", number in any::<i128>()) {
        for (name, _, kind) in SETTINGS.iter().filter(|(_, _, kind)| matches!(kind, Kind::Number)) {
            let whole = |text: &str| text.parse::<i64>().is_ok_and(|number| number >= 0);
            for text in [value.as_str(), &number.to_string()] {
                prop_assert_eq!(typed(name, text.to_owned(), *kind).is_ok(), whole(text));
                let _ = with(&[NEEDED[0], NEEDED[1], (name, text)]);
            }
        }
    }

    #[test]
    fn no_list_makes_it_panic(value in "[ -~]{0,40}") {
        for name in ["LFS_BROKER_TRUSTED_PROXIES", "LFS_BROKER_CORS_ORIGINS", "LFS_BROKER_PUBLIC_URL"] {
            let _ = with(&[NEEDED[0], NEEDED[1], (name, &value)]);
        }
    }
}

#[test]
fn a_secret_may_come_from_a_file() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "from a file\n").unwrap();
    let path = file.path().display().to_string();
    let settings = with(&[NEEDED[0], NEEDED[1], ("LFS_BROKER_JWT_HS256_SECRET_FILE", &path)]).unwrap();
    assert_eq!(settings.auth.hs256_secret.as_deref(), Some("from a file"));
}

/// The settings of a file alone.
fn from_file(text: &str) -> Result<app::Settings, Error> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    load(Some(file.path()), |name| NEEDED.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()))
}

#[test]
fn a_malformed_line_is_told_by_its_number_and_never_shown() {
    for (line, told_line) in [
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
        let told = from_file(line).err().unwrap_or_else(|| panic!("{line} is taken")).to_string();
        assert!(told.contains(told_line), "{line:?}: {told}");
        assert!(!["hush", "4812948129", "2026"].iter().any(|secret| told.contains(secret)), "{line:?}: {told}");
    }
}

#[test]
fn a_file_may_say_it_as_toml_does() {
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
fn the_readmes_file_is_read_as_it_says() {
    let readme = include_str!("../README.md");
    let (_, rest) = readme.split_once("```toml\n").expect("the README has an example");
    let (example, _) = rest.split_once("```").unwrap();
    let settings = from_file(example).unwrap();
    assert_eq!(settings.objects.bucket.as_deref(), Some("lfs"));
    assert_eq!(settings.kafka.properties["security.protocol"], "SASL_SSL");
    assert_eq!((settings.cors_origins.len(), settings.policy.part_size_bytes), (1, 32 << 20));
    kafka::Kafka::connect(&settings.kafka).unwrap();
    settings.objects.check().unwrap();
    // Every table is there once, and every setting of the file alone.
    let places: Vec<&str> = SETTINGS.iter().map(|(_, place, _)| *place).chain(["s3.endpoint", "kafka.properties"]).collect();
    for table in places.iter().filter_map(|place| place.split_once('.')).map(|(table, _)| table) {
        assert!(example.contains(&format!("[{table}")), "{table}");
    }
}
