//! The shape of the house, read from its source: imports point down, and each foreign language has one room.

use std::path::{Path, PathBuf};

/// Each room and its floor; a room may only look at floors below its own.
const FLOORS: &[(&str, u8)] = &[
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
    ("finish", 6),
    ("readiness", 6),
    ("restore_check", 6),
    ("auth", 7),
    ("kafka", 7),
    ("objects", 7),
    ("store", 7),
    ("failpoint", 8),
    ("policy", 8),
    ("wakes", 8),
    ("session", 9),
    ("telemetry", 9),
];

/// What only some rooms may say, and which: paths under `src` begin so.
const LANGUAGES: &[(&str, &[&str])] = &[
    ("query!(", &["store/"]),
    ("query_as!(", &["store/"]),
    ("query_scalar!(", &["store/"]),
    ("sqlx::", &["store/", "dev/postgres"]),
    ("aws_sdk_s3", &["objects/"]),
    ("aws_config", &["objects/"]),
    ("rdkafka", &["kafka/", "dev/kafka.rs"]),
    ("axum::", &["http/", "app.rs"]),
    ("jsonwebtoken", &["auth.rs", "auth/"]),
    ("s3s::", &["dev/s3/"]),
    ("StatusCode", &["http/", "objects/", "dev/s3/"]),
];

/// What the pure core does without: whatever is done twice gives the same twice.
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

/// Past this a file does a second thing.
const MOST_LINES: usize = 520;

fn floor(room: &str) -> Option<u8> {
    FLOORS.iter().find(|(name, _)| *name == room).map(|(_, floor)| *floor)
}

/// The room of a file: the first part of its path under `src`.
fn room(path: &str) -> &str {
    path.split('/').next().unwrap_or_default().trim_end_matches(".rs")
}

/// The code of a file: no comments, no tests.
fn code(text: &str) -> String {
    let body = text.split("#[cfg(test)]").next().unwrap_or_default();
    body.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// The rooms that code looks at: `crate::room::…` and `crate::{room, room::…}`.
fn looks_at(code: &str) -> Vec<String> {
    let name = |text: &str| text.trim().chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect::<String>();
    let mut rooms = Vec::new();
    for rest in code.split("crate::").skip(1) {
        let Some(group) = rest.strip_prefix('{') else {
            rooms.push(name(rest));
            continue;
        };
        // The names at the first level of the braces.
        let (mut depth, mut item) = (1, String::new());
        for c in group.chars() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if depth == 0 || (depth == 1 && c == ',') {
                rooms.push(name(&item));
                item.clear();
            } else {
                item.push(c);
            }
            if depth == 0 {
                break;
            }
        }
    }
    rooms.retain(|room| !room.is_empty());
    rooms
}

/// Everything that is wrong with a file under `src`.
fn complaints(path: &str, text: &str) -> Vec<String> {
    let mut complaints = Vec::new();
    let lines = text.lines().count();
    if lines > MOST_LINES {
        complaints.push(format!("{path} has {lines} lines, at most {MOST_LINES} fit"));
    }
    if path.ends_with("tests.rs") {
        return complaints;
    }
    let (own, code) = (room(path), code(text));
    if own != "lib" {
        match floor(own) {
            None => complaints.push(format!("{path}: the room {own} has no floor; say in FLOORS where it is")),
            Some(floor_of_own) => {
                for seen in looks_at(&code).into_iter().filter(|seen| seen != own) {
                    if floor(&seen).is_some_and(|floor| floor <= floor_of_own) {
                        complaints.push(format!("{path}: {own} looks up at {seen}, or across"));
                    }
                }
            }
        }
    }
    for (word, rooms) in LANGUAGES {
        if code.contains(word) && !rooms.iter().any(|room| path.starts_with(room)) {
            complaints.push(format!("{path}: {word} is spoken in {rooms:?} only"));
        }
    }
    if matches!(own, "session" | "policy") {
        complaints
            .extend(IMPURE.iter().filter(|word| code.contains(*word)).map(|word| format!("{path}: {word} in the pure core")));
    }
    complaints
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
fn imports_point_down_and_each_language_has_one_room() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    files(&source, &mut found);
    assert!(found.len() > 40, "{} files", found.len());
    let all: Vec<String> = found
        .iter()
        .flat_map(|path| {
            let name = path.strip_prefix(&source).unwrap().to_str().unwrap().replace('\\', "/");
            complaints(&name, &std::fs::read_to_string(path).unwrap())
        })
        .collect();
    assert!(all.is_empty(), "{}", all.join("\n"));
}

#[test]
fn the_client_knows_no_server() {
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
fn a_crooked_house_would_be_noticed() {
    let crooked = |path: &str, text: &str| complaints(path, text).len();
    assert_eq!(crooked("store/mod.rs", "use crate::broker::Broker;"), 1);
    assert_eq!(crooked("broker/mod.rs", "use crate::{policy, sweeper, store::{self, Store}};"), 1);
    assert_eq!(crooked("broker/open.rs", "fn f() { crate::http::answer() }"), 1);
    assert_eq!(crooked("session.rs", "use crate::{\n    policy::{self, wrong},\n};"), 1);
    assert_eq!(crooked("attic.rs", ""), 1);
    assert_eq!(crooked("broker/read.rs", "let rows = sqlx::query!(\"select 1\");"), 2);
    assert_eq!(crooked("app.rs", "use rdkafka::ClientConfig;"), 1);
    assert_eq!(crooked("broker/mod.rs", "use axum::http::StatusCode;"), 2);
    assert_eq!(crooked("http/mod.rs", "use jsonwebtoken::decode;"), 1);
    assert_eq!(crooked("session/refusal.rs", "async fn f() { g().await }"), 2);
    assert_eq!(crooked("policy.rs", "let id = Uuid::new_v4();"), 1);
    assert_eq!(crooked("http/mod.rs", &"\n".repeat(MOST_LINES + 1)), 1);

    let straight = "//! [`crate::http`] is above.\nuse crate::{finish::{self, Finisher}, policy};\nuse crate::broker::Error; // crate::app\n\
                    #[cfg(test)]\nmod tests { use crate::app; }";
    assert_eq!(complaints("broker/mod.rs", straight), Vec::<String>::new());
    assert_eq!(looks_at("use crate::{a, b::{c, d}, e::f};\nuse crate::g::h;"), ["a", "b", "e", "g"]);
}
