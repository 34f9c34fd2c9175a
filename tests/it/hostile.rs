//! Input that nobody sends by mistake: refused by name, never a fault of ours.

use serde_json::{Value, json};

use crate::harness::{Answer, House, sha256};

const UNKNOWN: &str = "01920000-0000-7000-8000-000000000000";

/// Asserts a refusal of the caller's: never 5xx, and always whole.
#[track_caller]
fn refused(answer: Answer, what: &str) -> Answer {
    assert!((400..500).contains(&answer.status), "{what}: {} {}", answer.status, answer.text);
    let (status, code) = (answer.status, answer.code().to_owned());
    answer.expect_problem(status, &code)
}

/// Asserts that a request was understood or refused, and broke nothing.
#[track_caller]
fn survived(answer: &Answer, what: &str) {
    assert!((200..500).contains(&answer.status), "{what}: {} {}", answer.status, answer.text);
}

/// A good open with one member's text replaced.
fn open_with(house: &House, member: &str, raw: &str) -> String {
    let good = [("topic", json!(house.topic).to_string()), ("size", "1".to_owned()), ("sha256", json!(sha256(b"x")).to_string())];
    let mut members: Vec<String> =
        good.iter().filter(|(name, _)| *name != member).map(|(name, value)| format!("\"{name}\":{value}")).collect();
    members.push(format!("\"{member}\":{raw}"));
    format!("{{{}}}", members.join(","))
}

#[tokio::test]
async fn repeated_members_and_deep_nesting_are_malformed_wherever_they_are() {
    let house = House::new().await;
    let deep = |open: &str, close: &str, depth: usize| format!("{}1{}", open.repeat(depth), close.repeat(depth));
    let mut tried = 0;
    for value in [
        r#"{"a":"1","a":"2"}"#.to_owned(),
        r#"{"a":"1","\u0061":"2"}"#.to_owned(),
        r#"{"b":{"c":[{"d":1,"d":1}]}}"#.to_owned(),
        r#"[[[{"":1,"":1}]]]"#.to_owned(),
        deep("[", "]", 200),
        deep("{\"a\":", "}", 200),
        deep("[{\"a\":", "}]", 100),
        deep("[", "]", 20_000),
    ] {
        for member in ["headers", "topic", "size", "x"] {
            let body = open_with(&house, member, &value);
            house.send_json("POST", "/lfs/uploads", body).await.expect_problem(400, "malformed-json");
            tried += 1;
        }
        for (method, path) in [
            ("POST", format!("/lfs/uploads/{UNKNOWN}/parts")),
            ("POST", format!("/lfs/uploads/{UNKNOWN}/complete")),
            ("POST", format!("/lfs/uploads/{UNKNOWN}/redrive")),
            ("PUT", "/lfs/topics/t".to_owned()),
        ] {
            let answer = house.send_json(method, &path, format!("{{\"x\":{value}}}")).await;
            answer.expect_problem(400, "malformed-json");
            tried += 1;
        }
        let pointer = format!("{{\"kfs_lfs\":1,\"bucket\":\"b\",\"key\":\"k\",\"size\":1,\"x\":{value}}}");
        survived(&house.send_json("POST", "/lfs/resolve", pointer).await, &value[..value.len().min(80)]);
        tried += 1;
    }
    for member in ["topic", "size", "sha256"] {
        let good = open_with(&house, member, "1");
        let twice = format!("{},\"{member}\":1}}", &good[..good.len() - 1]);
        house.send_json("POST", "/lfs/uploads", twice).await.expect_problem(400, "malformed-json");
        tried += 1;
    }
    println!("repeated members and deep nesting: {tried} bodies");
}

#[tokio::test]
async fn bytes_that_are_no_text_are_malformed() {
    let house = House::new().await;
    let mut tried = 0;
    for bad in [
        b"\xff".as_slice(),
        b"\xc3\x28",
        b"\xed\xa0\x80",
        b"\xf4\x90\x80\x80",
        b"\xc0\x80",
        b"\x00",
        b"\x1f",
        b"\n",
        b"\\ud800",
        b"\\udc00\\ud800",
        b"\\u00",
        b"\\x41",
        b"\\",
    ] {
        for member in ["topic", "key", "filename", "content_type", "sha256"] {
            let body = open_with(&house, member, "\"@\"").into_bytes();
            let at = body.windows(3).position(|bytes| bytes == b"\"@\"").unwrap() + 1;
            let body = [&body[..at], bad, &body[at + 1..]].concat();
            house.send_json("POST", "/lfs/uploads", body).await.expect_problem(400, "malformed-json");
            tried += 1;
        }
    }
    for body in [
        b"\xef\xbb\xbf{}".as_slice(),
        b"\xff\xfe{\x00}\x00",
        b"{}\x00",
        b"{'topic':'t'}",
        b"{\"topic\":NaN}",
        b"{\"size\":Infinity}",
        b"{\"size\":0x10}",
        b"{\"size\":01}",
        b"{\"size\":1.}",
        b"{\"size\":+1}",
        b"{\"size\":1,}",
        b"{/**/}",
        b"{\"topic\":\"t\" \"size\":1}",
        b"\n",
    ] {
        house.send_json("POST", "/lfs/uploads", body.to_vec()).await.expect_problem(400, "malformed-json");
        tried += 1;
    }
    println!("bytes that are no text: {tried} bodies");
}

#[tokio::test]
async fn numbers_beyond_every_type_are_refused_and_nothing_is_rounded() {
    let house = House::new().await;
    let numbers = [
        "1e400",
        "-1e400",
        "-1",
        "-0",
        "1.0",
        "0.5",
        "1e2",
        "1E-400",
        "9223372036854775808",
        "18446744073709551615",
        "18446744073709551616",
        "-9223372036854775809",
        "99999999999999999999999999999999999999",
        "5497558138881",
        "\"1\"",
        "true",
        "[]",
        "{}",
        "null",
    ];
    let mut tried = 0;
    for number in numbers {
        for member in ["size", "partition", "part_size"] {
            let answer = house.send_json("POST", "/lfs/uploads", open_with(&house, member, number)).await;
            survived(&answer, &format!("{member} {number}"));
            if member == "size" {
                refused(answer, &format!("size {number}"));
            }
            tried += 1;
        }
        for member in ["max_bytes", "min_bytes", "session_seconds", "session_max_seconds", "url_seconds"] {
            let answer = house.send_json("PUT", "/lfs/topics/t", format!("{{\"{member}\":{number}}}")).await;
            survived(&answer, &format!("{member} {number}"));
            if answer.status == 200 {
                let stored = house.get("/lfs/topics/t").await.expect(200);
                assert_eq!(stored.json, answer.json, "{member} {number}");
            }
            tried += 1;
        }
        let parts = format!("/lfs/uploads/{UNKNOWN}/parts");
        refused(house.send_json("POST", &parts, format!("{{\"part_numbers\":[{number}]}}")).await, number);
        let pointer = format!("{{\"kfs_lfs\":1,\"bucket\":\"b\",\"key\":\"k\",\"size\":{number}}}");
        refused(house.send_json("POST", "/lfs/resolve", pointer).await, number);
        let version = format!("{{\"kfs_lfs\":{number},\"bucket\":\"b\",\"key\":\"k\",\"size\":1}}");
        refused(house.send_json("POST", "/lfs/resolve", version).await, number);
        let query = number.replace('+', "%2B").replace('"', "%22");
        for path in [
            format!("/lfs/uploads?limit={query}"),
            format!("/lfs/uploads/{UNKNOWN}?wait={query}"),
            format!("/lfs/uploads/{UNKNOWN}?version={query}"),
        ] {
            refused(house.get(&path).await, &path);
        }
        tried += 6;
    }
    println!("numbers: {tried} requests");
}

#[tokio::test]
async fn control_characters_reach_no_header_no_name_and_no_table() {
    let house = House::new().await;
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
            let answer = house.send_json("POST", "/lfs/uploads", open_with(&house, member, &value)).await;
            survived(&answer, &format!("{member} {value}"));
            let is_control = !matches!(control, "\\u2028" | "\\u202e" | "\\ufeff" | "\\ud83d\\ude00");
            if is_control && matches!(member, "topic" | "filename" | "content_type") {
                answer.expect_problem(422, "validation-failed");
            } else if answer.status == 201 {
                let read = house.upload(&answer.id()).await.expect(200);
                if member == "key" {
                    let sent: Value = serde_json::from_str(&value).unwrap();
                    assert_eq!(read.json["key"], sent);
                }
            }
            tried += 1;
        }
        for (member, value) in [("bucket", control), ("prefix", control), ("kms_key_id", control)] {
            let answer = house.send_json("PUT", "/lfs/topics/t", format!("{{\"{member}\":\"a{value}b\"}}")).await;
            survived(&answer, &format!("policy {member} {value}"));
            tried += 1;
        }
        for (member, other) in [("bucket", "key"), ("key", "bucket"), ("content_type", "key")] {
            let pointer =
                format!("{{\"kfs_lfs\":1,\"{member}\":\"a/t/lfs/{control}\",\"{other}\":\"default/t/lfs/x\",\"size\":1}}");
            refused(house.send_json("POST", "/lfs/resolve", pointer).await, &format!("pointer {member} {control}"));
            tried += 1;
        }
    }
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
            let answers = house.raw(format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").as_bytes()).await;
            assert!((200..500).contains(&answers[0].status), "{path}: {:?}", answers[0]);
            assert!(
                !answers[0].head.contains("\r\nset-cookie") && answers[0].head.contains("x-request-id"),
                "{path}: {:?}",
                answers[0]
            );
            tried += 1;
        }
        let put = "content-type: application/json\r\ncontent-length: 2\r\n\r\n{}";
        for (method, rest) in [("PUT", put), ("DELETE", "\r\n")] {
            let request = format!("{method} /lfs/topics/{control} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n{rest}");
            let answers = house.raw(request.as_bytes()).await;
            assert!((200..500).contains(&answers[0].status), "{control}: {:?}", answers[0]);
            tried += 1;
        }
    }
    // Keys of the caller's own, as far as their beginning tells.
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
        let (bucket, topic) = (&house.bucket, &house.topic);
        let pointer = format!("{{\"kfs_lfs\":1,\"bucket\":\"{bucket}\",\"key\":\"default/{topic}/lfs/{end}\",\"size\":1}}");
        for query in ["", "?validate=true", "?version_id=x"] {
            refused(house.send_json("POST", &format!("/lfs/resolve{query}"), pointer.clone()).await, &pointer);
            tried += 1;
        }
    }
    let resolved = house.publish(b"hello", json!({})).await.json["pointer"].to_string();
    for version in ["%00", "%0d%0ax", "%ff", "..", "null", "%F0%9F%98%80", &"x".repeat(4000)] {
        let answer = house.send_json("POST", &format!("/lfs/resolve?version_id={version}"), resolved.clone()).await;
        survived(&answer, version);
        tried += 1;
    }
    println!("control characters: {tried} requests");
}

#[tokio::test]
async fn no_header_of_a_request_breaks_anything() {
    let house = House::new().await;
    let body = json!({"topic": house.topic, "size": 1, "sha256": sha256(b"x")}).to_string();
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
            let answers = house.raw(&request).await;
            let answer = answers.last().unwrap_or_else(|| panic!("{name} {value:?}: no answer"));
            assert!((200..500).contains(&answer.status), "{name} {value:?}: {answer:?}");
            assert!(answer.head.contains("x-request-id: "), "{name} {value:?}: {answer:?}");
            tried += 1;
        }
    }
    println!("headers: {tried} requests");
}

#[tokio::test]
async fn paths_mean_what_they_say_and_nothing_else() {
    let house = House::new().await;
    let id = house.open(b"x", json!({})).await.expect(201).id();
    house.put_policy("t", &json!({})).await.expect(200);
    let get = async |path: &str| {
        let answers = house.raw(format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").as_bytes()).await;
        (
            answers[0].status,
            serde_json::from_str::<Value>(&answers[0].body).unwrap_or_default()["code"].as_str().unwrap_or_default().to_owned(),
        )
    };
    // A UUID is the same in either case, and in no other form.
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
    // One decoding is due, a second is not.
    assert_eq!(get("/lfs/topics/%74").await.0, 200);
    assert_eq!(get("/lfs/topics/%2574").await, (404, "topic-not-found".to_owned()));
    for form in ["{}", "urn:uuid:{}"] {
        let path = format!("/lfs/uploads/{}", form.replace("{}", &id));
        let (status, code) = get(&path).await;
        assert!(status == 200 || code == "upload-not-found", "{path}: {status} {code}");
    }
    // An absolute form names the same place, whatever host it names.
    assert_eq!(get(&format!("http://elsewhere.example/lfs/uploads/{id}")).await.0, 200);
    for (method, path) in
        [("OPTIONS", "*"), ("CONNECT", "a:443"), ("TRACE", "/"), ("get", "/healthz"), ("X".repeat(200).as_str(), "/")]
    {
        let answers = house.raw(format!("{method} {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").as_bytes()).await;
        assert!(answers.iter().all(|answer| (200..500).contains(&answer.status)), "{method} {path}: {answers:?}");
        tried += 1;
    }
    println!("paths: {} requests", tried + 6);
}

#[tokio::test]
async fn nobody_assigns_what_is_the_brokers() {
    let house = House::new().await;
    let mut tried = 0;
    for member in [
        "id",
        "tenant",
        "state",
        "version",
        "bucket",
        "object_key",
        "subject",
        "sub",
        "created_at",
        "expires_at",
        "pointer",
        "record",
        "integrity",
        "write_token",
        "upload_id",
        "s3_upload_id",
        "shard",
        "lease_owner",
        "__proto__",
        "constructor",
        "Topic",
        "topic ",
        "",
    ] {
        for value in [json!("published"), json!(1), json!({"a": 1}), Value::Null] {
            let mut body = json!({"topic": house.topic, "size": 1, "sha256": sha256(b"x")});
            body.as_object_mut().unwrap().insert(member.to_owned(), value.clone());
            let answer = house.post("/lfs/uploads", &body).await.expect_problem(422, "validation-failed");
            assert!(answer.text.contains(&format!("/{member}")), "{member}: {}", answer.text);
            for (method, path) in [
                ("POST", format!("/lfs/uploads/{UNKNOWN}/complete")),
                ("PUT", "/lfs/topics/t".to_owned()),
                ("POST", format!("/lfs/uploads/{UNKNOWN}/parts")),
            ] {
                let is_known = method == "PUT" && member == "bucket";
                if !is_known {
                    house
                        .send_json(method, &path, json!({member: value}).to_string())
                        .await
                        .expect_problem(422, "validation-failed");
                }
                tried += 1;
            }
            tried += 1;
        }
    }
    for query in
        ["tenant=other&tenant=other", "sub=x", "admin=true", "state=open&bogus=1", "limit=1&limit=2", "cursor=a&cursor=b"]
    {
        refused(house.get(&format!("/lfs/uploads?{query}")).await, query);
        tried += 1;
    }
    println!("mass assignment: {tried} requests");
}

#[tokio::test]
async fn cursors_that_were_not_given_are_refused() {
    let house = House::new().await;
    for n in 0..3u8 {
        house.open(&[n], json!({})).await.expect(201);
    }
    let page = house.get("/lfs/uploads?limit=1").await.expect(200);
    let cursor = page.json["next_cursor"].as_str().unwrap().to_owned();
    house.get(&format!("/lfs/uploads?limit=1&cursor={cursor}")).await.expect(200);
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
        let answer = house.get(&format!("/lfs/uploads?limit=1&cursor={changed}")).await;
        if changed != cursor {
            survived(&answer, &changed);
            tried += 1;
        }
    }
    for other in ["topic=x", "state=open", "key_prefix=a"] {
        refused(house.get(&format!("/lfs/uploads?limit=1&{other}&cursor={cursor}")).await, other);
    }
    println!("cursors: {tried} changed");
}
