//! The architecture, checked in the source: imports point down, and each external library has one module.

use std::path::{Path, PathBuf};

/// Each module and its layer. A module may import only from layers with a higher number.
const LAYERS: &[(&str, u8)] = &[
    ("main", 0),
    ("cli", 1),
    ("config", 2),
    ("dev", 2),
    ("app", 3),
    ("http", 4),
    ("audit", 5),
    ("broker", 5),
    ("relay", 5),
    ("sweeper", 5),
    ("verifier", 5),
    ("completion", 6),
    ("readiness", 6),
    ("replica_link", 6),
    ("restore_check", 6),
    ("auth", 7),
    ("kafka", 7),
    ("objects", 7),
    ("store", 7),
    ("failpoint", 8),
    ("policy", 8),
    ("notify", 8),
    ("session", 9),
    ("telemetry", 9),
];

/// Text that only some modules may contain, and the paths under `src` where it is allowed.
const LIBRARIES: &[(&str, &[&str])] = &[
    ("query!(", &["store/"]),
    ("query_as!(", &["store/"]),
    ("query_scalar!(", &["store/"]),
    ("sqlx::", &["store/"]),
    ("aws_sdk_s3", &["objects/"]),
    ("aws_config", &["objects/"]),
    ("rdkafka", &["kafka/"]),
    ("axum::", &["http/", "app.rs"]),
    ("jsonwebtoken", &["auth.rs", "auth/"]),
    ("s3s::", &[]),
    ("lfs_broker_embedded", &["dev.rs"]),
    ("StatusCode", &["http/", "objects/"]),
];

/// What `session` and `policy` must not contain, so that the same input always gives the same result.
const IMPURE: &[&str] = &[
    "async ",
    ".await",
    "now_utc",
    "now_v7",
    "new_v4",
    "new_v7",
    "Instant",
    "SystemTime",
    "fastrand",
    "tokio",
    "std::fs",
    "std::env",
];

/// The most lines of a file: a longer file does more than one thing.
const MAX_LINES: usize = 520;

fn layer(module: &str) -> Option<u8> {
    LAYERS.iter().find(|(name, _)| *name == module).map(|(_, layer)| *layer)
}

/// The module of a file: the first part of its path under `src`.
fn module(path: &str) -> &str {
    path.split('/').next().unwrap_or_default().trim_end_matches(".rs")
}

/// The code of a file, without comments and tests.
fn code(text: &str) -> String {
    let body = text.split("#[cfg(test)]").next().unwrap_or_default();
    body.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// The modules that code imports, as `crate::module::…` or `crate::{module, module::…}`.
fn imports(code: &str) -> Vec<String> {
    let name = |text: &str| text.trim().chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect::<String>();
    let mut modules = Vec::new();
    for rest in code.split("crate::").skip(1) {
        let Some(group) = rest.strip_prefix('{') else {
            modules.push(name(rest));
            continue;
        };
        // Only the names at the first level of the braces.
        let (mut depth, mut item) = (1, String::new());
        for c in group.chars() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if depth == 0 || (depth == 1 && c == ',') {
                modules.push(name(&item));
                item.clear();
            } else {
                item.push(c);
            }
            if depth == 0 {
                break;
            }
        }
    }
    modules.retain(|module| !module.is_empty());
    modules
}

/// Every violation of the rules in a file under `src`.
fn violations(path: &str, text: &str) -> Vec<String> {
    let mut violations = Vec::new();
    let lines = text.lines().count();
    if lines > MAX_LINES {
        violations.push(format!("{path} has {lines} lines, the maximum is {MAX_LINES}"));
    }
    if path.ends_with("tests.rs") {
        return violations;
    }
    let (own, code) = (module(path), code(text));
    if own != "lib" {
        match layer(own) {
            None => violations.push(format!("{path}: the module {own} has no layer; add it to LAYERS")),
            Some(own_layer) => {
                for imported in imports(&code).into_iter().filter(|imported| imported != own) {
                    if layer(&imported).is_some_and(|layer| layer <= own_layer) {
                        violations.push(format!("{path}: {own} imports {imported}, which is not in a lower layer"));
                    }
                }
            }
        }
    }
    for (word, modules) in LIBRARIES {
        if code.contains(word) && !modules.iter().any(|module| path.starts_with(module)) {
            violations.push(format!("{path}: {word} is allowed in {modules:?} only"));
        }
    }
    if matches!(own, "session" | "policy") {
        violations.extend(
            IMPURE.iter().filter(|word| code.contains(*word)).map(|word| format!("{path}: {word} in a module without I/O")),
        );
    }
    violations
}

fn files(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn imports_point_down_and_each_library_has_one_module() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    files(&source, &mut found);
    assert!(found.len() > 40, "{} files", found.len());
    let all: Vec<String> = found
        .iter()
        .flat_map(|path| {
            let name = path.strip_prefix(&source).unwrap().to_str().unwrap().replace('\\', "/");
            violations(&name, &std::fs::read_to_string(path).unwrap())
        })
        .collect();
    assert!(all.is_empty(), "{}", all.join("\n"));
}

#[test]
fn the_client_imports_no_server_code() {
    let mut found = Vec::new();
    files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("client/src"), &mut found);
    for path in found {
        let code = code(&std::fs::read_to_string(&path).unwrap());
        for word in ["lfs_broker::", "sqlx", "aws_sdk_s3", "rdkafka", "axum", "jsonwebtoken"] {
            assert!(!code.contains(word), "{word} in {}", path.display());
        }
    }
}

#[test]
fn the_embedded_servers_import_no_broker_code() {
    let mut found = Vec::new();
    files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("embedded/src"), &mut found);
    assert!(found.len() > 10, "{} files", found.len());
    for path in found {
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.lines().count() <= MAX_LINES, "{} is too long", path.display());
        let code = code(&text);
        for word in ["lfs_broker::", "lfs_broker_client", "query!(", "aws_sdk_s3", "axum", "jsonwebtoken"] {
            assert!(!code.contains(word), "{word} in {}", path.display());
        }
        for (library, module) in [("sqlx::", "postgres"), ("rdkafka", "kafka"), ("s3s::", "s3")] {
            let is_allowed = path.components().any(|part| part.as_os_str().to_string_lossy().trim_end_matches(".rs") == module);
            assert!(is_allowed || !code.contains(library), "{library} in {}", path.display());
        }
    }
}

#[test]
fn violations_of_the_architecture_are_found() {
    let count = |path: &str, text: &str| violations(path, text).len();
    assert_eq!(count("store/mod.rs", "use crate::broker::Broker;"), 1);
    assert_eq!(count("broker/mod.rs", "use crate::{policy, sweeper, store::{self, Store}};"), 1);
    assert_eq!(count("broker/open.rs", "fn f() { crate::http::answer() }"), 1);
    assert_eq!(count("session.rs", "use crate::{\n    policy::{self, FieldError},\n};"), 1);
    assert_eq!(count("attic.rs", ""), 1);
    assert_eq!(count("broker/read.rs", "let rows = sqlx::query!(\"select 1\");"), 2);
    assert_eq!(count("app.rs", "use rdkafka::ClientConfig;"), 1);
    assert_eq!(count("app.rs", "use lfs_broker_embedded::kafka;"), 1);
    assert_eq!(count("broker/mod.rs", "use axum::http::StatusCode;"), 2);
    assert_eq!(count("http/mod.rs", "use jsonwebtoken::decode;"), 1);
    assert_eq!(count("session/error.rs", "async fn f() { g().await }"), 2);
    assert_eq!(count("policy.rs", "let id = Uuid::new_v4();"), 1);
    assert_eq!(count("http/mod.rs", &"\n".repeat(MAX_LINES + 1)), 1);

    let allowed = "//! [`crate::http`] is above.\nuse crate::{completion::{self, CompletionWorker}, policy};\nuse crate::broker::Error; // crate::app\n\
                    #[cfg(test)]\nmod tests { use crate::app; }";
    assert_eq!(violations("broker/mod.rs", allowed), Vec::<String>::new());
    assert_eq!(imports("use crate::{a, b::{c, d}, e::f};\nuse crate::g::h;"), ["a", "b", "e", "g"]);
}
