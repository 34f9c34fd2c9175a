//! Hostile input outside of bodies: characters in names and queries, headers, paths and cursors.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};

use super::{UNKNOWN, assert_no_server_error, assert_refused, open_with};
use crate::harness::{TestBroker, sha256};

#[tokio::test]
async fn control_characters_reach_no_header_no_name_and_no_table() {
    let broker = TestBroker::start().await;
    let mut tried = 0;
    for control in [
        "\\u0000",
        "\\r\\n",
        "\\n",
        "\\r",
        "\\t",
        "\\u001b[2J",
        "\\u007f",
        "\\u0085",
        "\\u2028",
        "\\u202e",
        "\\ufeff",
        "\\ud83d\\ude00",
    ] {
        for (member, value) in [
            ("topic", format!("\"a{control}b\"")),
            ("key", format!("\"a{control}b\"")),
            ("filename", format!("\"a{control}set-cookie: x\"")),
            ("content_type", format!("\"text/plain{control}x: y\"")),
            ("headers", format!("{{\"a{control}b\":\"1\"}}")),
            ("headers", format!("{{\"a\":\"1{control}x: y\"}}")),
            ("sha256", format!("\"{control}\"")),
            ("key_base64", format!("\"YQ=={control}\"")),
            ("part_hashes", format!("\"{control}\"")),
        ] {
            let response = broker.send_json("POST", "/lfs/uploads", open_with(&broker, member, &value)).await;
            assert_no_server_error(&response, &format!("{member} {value}"));
            let is_control = !matches!(control, "\\u2028" | "\\u202e" | "\\ufeff" | "\\ud83d\\ude00");
            if is_control && matches!(member, "topic" | "filename" | "content_type") {
                response.expect_problem(422, "validation-failed");
            } else if response.status == 201 {
                let read = broker.upload(&response.id()).await.expect(200);
                if member == "key" {
                    let sent: Value = serde_json::from_str(&value).unwrap();
                    assert_eq!(read.json["key"], sent);
                }
            }
            tried += 1;
        }
        for (member, value) in [("bucket", control), ("prefix", control), ("kms_key_id", control)] {
            let response = broker.send_json("PUT", "/lfs/topics/t", format!("{{\"{member}\":\"a{value}b\"}}")).await;
            assert_no_server_error(&response, &format!("policy {member} {value}"));
            tried += 1;
        }
        for (member, other) in [("bucket", "key"), ("key", "bucket"), ("content_type", "key")] {
            let pointer =
                format!("{{\"kfs_lfs\":1,\"{member}\":\"a/t/lfs/{control}\",\"{other}\":\"default/t/lfs/x\",\"size\":1}}");
            assert_refused(broker.send_json("POST", "/lfs/resolve", pointer).await, &format!("pointer {member} {control}"));
            tried += 1;
        }
    }
    println!("control characters: {tried} bodies");
}

#[tokio::test]
async fn control_characters_in_paths_and_queries_cause_no_server_error() {
    let broker = TestBroker::start().await;
    let mut tried = 0;
    for control in ["%00", "%0d%0a", "%0A", "%7f", "%ff", "%c3%28", "%", "%zz", "%E2%80%AE", "a%00b"] {
        for path in [
            format!("/lfs/uploads?topic={control}"),
            format!("/lfs/uploads?key_prefix={control}"),
            format!("/lfs/uploads?tenant={control}"),
            format!("/lfs/uploads?cursor={control}"),
            format!("/lfs/uploads?state={control}"),
            format!("/lfs/uploads?{control}=1"),
            format!("/lfs/uploads?created_after={control}"),
            format!("/lfs/uploads/{control}"),
            format!("/lfs/uploads/{UNKNOWN}?wait={control}"),
            format!("/lfs/topics/{control}"),
            format!("/lfs/topics?cursor={control}"),
            format!("/problems/{control}"),
            format!("/docs/{control}"),
            format!("/{control}"),
        ] {
            let responses =
                broker.send_raw(format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").as_bytes()).await;
            assert!((200..500).contains(&responses[0].status), "{path}: {:?}", responses[0]);
            assert!(
                !responses[0].head.contains("\r\nset-cookie") && responses[0].head.contains("x-request-id"),
                "{path}: {:?}",
                responses[0]
            );
            tried += 1;
        }
        let put = "content-type: application/json\r\ncontent-length: 2\r\n\r\n{}";
        for (method, rest) in [("PUT", put), ("DELETE", "\r\n")] {
            let request = format!("{method} /lfs/topics/{control} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n{rest}");
            let responses = broker.send_raw(request.as_bytes()).await;
            assert!((200..500).contains(&responses[0].status), "{control}: {:?}", responses[0]);
            tried += 1;
        }
    }
    println!("control characters: {tried} paths and queries");
}

#[tokio::test]
async fn pointers_with_impossible_keys_are_refused() {
    let broker = TestBroker::start().await;
    let mut tried = 0;
    // The keys begin like keys of the caller's own tenant.
    for end in [
        "\\u0000",
        "a\\u0000b",
        "\\r\\nx: y",
        "../x",
        "a/../../b",
        ".",
        "..",
        "%2e%2e",
        "a//b",
        "\\ud83d\\ude00",
        &"x".repeat(1500),
        "",
    ] {
        let (bucket, topic) = (&broker.bucket, &broker.topic);
        let pointer = format!("{{\"kfs_lfs\":1,\"bucket\":\"{bucket}\",\"key\":\"default/{topic}/lfs/{end}\",\"size\":1}}");
        for query in ["", "?validate=true", "?version_id=x"] {
            assert_refused(broker.send_json("POST", &format!("/lfs/resolve{query}"), pointer.clone()).await, &pointer);
            tried += 1;
        }
    }
    let resolved = broker.publish(b"hello", json!({})).await.json["pointer"].to_string();
    for version in ["%00", "%0d%0ax", "%ff", "..", "null", "%F0%9F%98%80", &"x".repeat(4000)] {
        let response = broker.send_json("POST", &format!("/lfs/resolve?version_id={version}"), resolved.clone()).await;
        assert_no_server_error(&response, version);
        tried += 1;
    }
    println!("pointers: {tried} requests");
}

#[tokio::test]
async fn a_nul_in_an_administrators_pointer_is_the_callers_error() {
    let broker = TestBroker::start().await;
    let (bucket, topic) = (&broker.bucket, &broker.topic);
    for (bucket, key) in [
        (bucket.clone(), format!("a\\u0000b/{topic}/lfs/x")),
        (bucket.clone(), format!("default/{topic}/lfs/a\\u0000b")),
        (format!("{bucket}\\u0000"), format!("default/{topic}/lfs/x")),
    ] {
        let pointer = format!("{{\"kfs_lfs\":1,\"bucket\":\"{bucket}\",\"key\":\"{key}\",\"size\":1}}");
        for query in ["", "?validate=true"] {
            let response = broker.send_json("POST", &format!("/lfs/resolve{query}"), pointer.clone()).await;
            response.expect_problem(422, "pointer-invalid");
        }
    }
    // Other names that no store can have are the caller's error too.
    for key in ["a\\\\b", "\\\\", "a:b|c*?<>", &format!("{}/x", "d".repeat(300))] {
        let pointer = format!("{{\"kfs_lfs\":1,\"bucket\":\"{bucket}\",\"key\":\"default/{topic}/lfs/{key}\",\"size\":1}}");
        assert_refused(broker.send_json("POST", "/lfs/resolve", pointer.clone()).await, &pointer);
    }
}

#[tokio::test]
async fn no_request_header_causes_a_server_error() {
    let broker = TestBroker::start().await;
    let body = json!({"topic": broker.topic, "size": 1, "sha256": sha256(b"x")}).to_string();
    let mut tried = 0;
    for name in [
        "idempotency-key",
        "traceparent",
        "x-request-id",
        "authorization",
        "content-type",
        "x-forwarded-for",
        "origin",
        "accept",
        "host",
        "expect",
        "cookie",
    ] {
        for value in [
            b"".as_slice(),
            b" ",
            b"\t",
            b"\xff\xfe",
            b"a\xc3\xa9",
            b"\"",
            b"\"\"",
            b"a,b",
            b"00-0-0-0",
            b"../..",
            b"%0d%0a",
            &[b'x'; 8000],
        ] {
            let head =
                format!("POST /lfs/uploads HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: {}\r\n", body.len());
            let kind: &[u8] = if name == "content-type" { b"" } else { b"content-type: application/json\r\n" };
            let request = [head.as_bytes(), kind, name.as_bytes(), b": ", value, b"\r\n\r\n", body.as_bytes()].concat();
            let responses = broker.send_raw(&request).await;
            let response = responses.last().unwrap_or_else(|| panic!("{name} {value:?}: no response"));
            assert!((200..500).contains(&response.status), "{name} {value:?}: {response:?}");
            assert!(response.head.contains("x-request-id: "), "{name} {value:?}: {response:?}");
            tried += 1;
        }
    }
    println!("headers: {tried} requests");
}

#[tokio::test]
async fn a_path_is_decoded_once_and_not_normalized() {
    let broker = TestBroker::start().await;
    let id = broker.open(b"x", json!({})).await.expect(201).id();
    broker.put_policy("t", &json!({})).await.expect(200);
    let get = async |path: &str| {
        let responses = broker.send_raw(format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").as_bytes()).await;
        (
            responses[0].status,
            serde_json::from_str::<Value>(&responses[0].body).unwrap_or_default()["code"].as_str().unwrap_or_default().to_owned(),
        )
    };
    // A UUID may be in upper case, but in no other form.
    assert_eq!(get(&format!("/lfs/uploads/{}", id.to_uppercase())).await.0, 200);
    let mut tried = 1;
    for path in [
        format!("/lfs/uploads/{id}/"),
        format!("/lfs/uploads//{id}"),
        format!("//lfs/uploads/{id}"),
        format!("/lfs/./uploads/{id}"),
        format!("/lfs/topics/../uploads/{id}"),
        format!("/lfs/topics/..%2fuploads%2f{id}"),
        format!("/lfs%2fuploads/{id}"),
        format!("/lfs/uploads%2f{id}"),
        format!("/LFS/uploads/{id}"),
        format!("/lfs/uploads/{id}/../{id}"),
        format!("/lfs/uploads/{id}/complete/.."),
        format!("/lfs/uploads/{id};a=b"),
        format!("/lfs/uploads/{id}%00"),
        format!("/lfs/uploads/{id}%20"),
        format!("/lfs/uploads/%2e%2e/{id}"),
        format!("/lfs/uploads/{}", id.replacen('0', "%2530", 1)),
        format!("/lfs/uploads/..%2f{id}"),
        format!("/docs/../lfs/uploads/{id}"),
        "/docs/..%2f..%2fetc%2fpasswd".to_owned(),
        "/docs/%2e%2e/%2e%2e/Cargo.toml".to_owned(),
        "/docs/....//index.html".to_owned(),
        "/problems/../openapi.json".to_owned(),
        "/problems/internal/".to_owned(),
        "/problems/INTERNAL".to_owned(),
        "/lfs/topics/t/".to_owned(),
        "/lfs/topics/t%2f".to_owned(),
        "/lfs/topics/T".to_owned(),
        "/lfs/topics/%74%2fx".to_owned(),
        "/healthz/".to_owned(),
        "/.".to_owned(),
        "/..".to_owned(),
        "/%2e%2e".to_owned(),
    ] {
        let (status, code) = get(&path).await;
        assert!(status == 404 && code.ends_with("not-found"), "{path}: {status} {code}");
        tried += 1;
    }
    // A path is percent-decoded once, not twice.
    assert_eq!(get("/lfs/topics/%74").await.0, 200);
    assert_eq!(get("/lfs/topics/%2574").await, (404, "topic-not-found".to_owned()));
    for form in ["{}", "urn:uuid:{}"] {
        let path = format!("/lfs/uploads/{}", form.replace("{}", &id));
        let (status, code) = get(&path).await;
        assert!(status == 200 || code == "upload-not-found", "{path}: {status} {code}");
    }
    // The absolute form names the same resource, whatever host it names.
    assert_eq!(get(&format!("http://elsewhere.example/lfs/uploads/{id}")).await.0, 200);
    for (method, path) in
        [("OPTIONS", "*"), ("CONNECT", "a:443"), ("TRACE", "/"), ("get", "/healthz"), ("X".repeat(200).as_str(), "/")]
    {
        let responses =
            broker.send_raw(format!("{method} {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").as_bytes()).await;
        assert!(responses.iter().all(|response| (200..500).contains(&response.status)), "{method} {path}: {responses:?}");
        tried += 1;
    }
    println!("paths: {} requests", tried + 6);
}

#[tokio::test]
async fn cursors_that_the_broker_did_not_issue_cause_no_server_error() {
    let broker = TestBroker::start().await;
    for n in 0..3u8 {
        broker.open(&[n], json!({})).await.expect(201);
    }
    let page = broker.get("/lfs/uploads?limit=1").await.expect(200);
    let cursor = page.json["next_cursor"].as_str().unwrap().to_owned();
    broker.get(&format!("/lfs/uploads?limit=1&cursor={cursor}")).await.expect(200);
    let mut random = fastrand::Rng::with_seed(7);
    let mut tried = 0;
    for n in 0..300 {
        let mut bytes = cursor.clone().into_bytes();
        match n % 3 {
            0 => {
                let at = random.usize(..bytes.len());
                bytes[at] = random.alphanumeric() as u8;
            }
            1 => bytes.truncate(random.usize(..bytes.len())),
            _ => bytes.extend((0..random.usize(1..40)).map(|_| random.alphanumeric() as u8)),
        }
        let changed = String::from_utf8(bytes).unwrap();
        let response = broker.get(&format!("/lfs/uploads?limit=1&cursor={changed}")).await;
        if changed != cursor {
            assert_no_server_error(&response, &changed);
            tried += 1;
        }
    }
    // The fingerprint of this list, with times at and beyond the limits of PostgreSQL.
    let read = URL_SAFE_NO_PAD.decode(&cursor).unwrap();
    for seconds in [
        -377_705_116_800i128,
        -210_866_803_300,
        -62_167_219_201,
        253_402_300_799,
        i128::from(i64::MAX),
        i128::MIN / 2_000_000_000,
    ] {
        let forged = URL_SAFE_NO_PAD.encode([&read[..8], &(seconds * 1_000_000_000).to_be_bytes(), &read[24..]].concat());
        assert_no_server_error(&broker.get(&format!("/lfs/uploads?limit=1&cursor={forged}")).await, &format!("{seconds}"));
        tried += 1;
    }
    for time in [
        "0000-01-01T00:00:00Z",
        "0001-01-01T00:00:00%2B23:59",
        "9999-12-31T23:59:59-23:59",
        "2026-02-30T00:00:00Z",
        "2026-11-21T23:59:60Z",
    ] {
        assert_no_server_error(&broker.get(&format!("/lfs/uploads?created_after={time}&created_before={time}")).await, time);
        tried += 1;
    }
    for other in ["topic=x", "state=open", "key_prefix=a"] {
        assert_refused(broker.get(&format!("/lfs/uploads?limit=1&{other}&cursor={cursor}")).await, other);
    }
    println!("cursors: {tried} changed");
}
