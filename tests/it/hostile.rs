//! Hostile request bodies: each is refused by its error code and never causes a 5xx.

use serde_json::{Value, json};

use crate::harness::{ApiResponse, TestBroker, sha256};

mod inputs;

const UNKNOWN: &str = "01920000-0000-7000-8000-000000000000";

/// Asserts a 4xx problem document.
#[track_caller]
fn assert_refused(response: ApiResponse, case: &str) -> ApiResponse {
    assert!((400..500).contains(&response.status), "{case}: {} {}", response.status, response.text);
    let (status, code) = (response.status, response.code().to_owned());
    response.expect_problem(status, &code)
}

/// Asserts that a request was accepted or refused, but caused no 5xx.
#[track_caller]
fn assert_no_server_error(response: &ApiResponse, case: &str) {
    assert!((200..500).contains(&response.status), "{case}: {} {}", response.status, response.text);
}

/// A valid open with one member's JSON text replaced.
fn open_with(broker: &TestBroker, member: &str, raw: &str) -> String {
    let good =
        [("topic", json!(broker.topic).to_string()), ("size", "1".to_owned()), ("sha256", json!(sha256(b"x")).to_string())];
    let mut members: Vec<String> =
        good.iter().filter(|(name, _)| *name != member).map(|(name, value)| format!("\"{name}\":{value}")).collect();
    members.push(format!("\"{member}\":{raw}"));
    format!("{{{}}}", members.join(","))
}

#[tokio::test]
async fn repeated_members_and_deep_nesting_are_malformed_at_every_level() {
    let broker = TestBroker::start().await;
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
            let body = open_with(&broker, member, &value);
            broker.send_json("POST", "/lfs/uploads", body).await.expect_problem(400, "malformed-json");
            tried += 1;
        }
        for (method, path) in [
            ("POST", format!("/lfs/uploads/{UNKNOWN}/parts")),
            ("POST", format!("/lfs/uploads/{UNKNOWN}/complete")),
            ("POST", format!("/lfs/uploads/{UNKNOWN}/redrive")),
            ("PUT", "/lfs/topics/t".to_owned()),
        ] {
            let response = broker.send_json(method, &path, format!("{{\"x\":{value}}}")).await;
            response.expect_problem(400, "malformed-json");
            tried += 1;
        }
        let pointer = format!("{{\"kfs_lfs\":1,\"bucket\":\"b\",\"key\":\"k\",\"size\":1,\"x\":{value}}}");
        assert_no_server_error(&broker.send_json("POST", "/lfs/resolve", pointer).await, &value[..value.len().min(80)]);
        tried += 1;
    }
    for member in ["topic", "size", "sha256"] {
        let good = open_with(&broker, member, "1");
        let twice = format!("{},\"{member}\":1}}", &good[..good.len() - 1]);
        broker.send_json("POST", "/lfs/uploads", twice).await.expect_problem(400, "malformed-json");
        tried += 1;
    }
    println!("repeated members and deep nesting: {tried} bodies");
}

#[tokio::test]
async fn bytes_that_are_not_utf8_text_are_malformed() {
    let broker = TestBroker::start().await;
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
            let body = open_with(&broker, member, "\"@\"").into_bytes();
            let at = body.windows(3).position(|bytes| bytes == b"\"@\"").unwrap() + 1;
            let body = [&body[..at], bad, &body[at + 1..]].concat();
            broker.send_json("POST", "/lfs/uploads", body).await.expect_problem(400, "malformed-json");
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
        broker.send_json("POST", "/lfs/uploads", body.to_vec()).await.expect_problem(400, "malformed-json");
        tried += 1;
    }
    println!("bytes that are not text: {tried} bodies");
}

#[tokio::test]
async fn numbers_out_of_range_are_refused_and_no_number_is_rounded() {
    let broker = TestBroker::start().await;
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
            let response = broker.send_json("POST", "/lfs/uploads", open_with(&broker, member, number)).await;
            assert_no_server_error(&response, &format!("{member} {number}"));
            if member == "size" {
                assert_refused(response, &format!("size {number}"));
            }
            tried += 1;
        }
        for member in ["max_bytes", "min_bytes", "session_seconds", "session_max_seconds", "url_seconds"] {
            let response = broker.send_json("PUT", "/lfs/topics/t", format!("{{\"{member}\":{number}}}")).await;
            assert_no_server_error(&response, &format!("{member} {number}"));
            if response.status == 200 {
                let stored = broker.get("/lfs/topics/t").await.expect(200);
                assert_eq!(stored.json, response.json, "{member} {number}");
            }
            tried += 1;
        }
        let parts = format!("/lfs/uploads/{UNKNOWN}/parts");
        assert_refused(broker.send_json("POST", &parts, format!("{{\"part_numbers\":[{number}]}}")).await, number);
        let pointer = format!("{{\"kfs_lfs\":1,\"bucket\":\"b\",\"key\":\"k\",\"size\":{number}}}");
        assert_refused(broker.send_json("POST", "/lfs/resolve", pointer).await, number);
        let version = format!("{{\"kfs_lfs\":{number},\"bucket\":\"b\",\"key\":\"k\",\"size\":1}}");
        assert_refused(broker.send_json("POST", "/lfs/resolve", version).await, number);
        let query = number.replace('+', "%2B").replace('"', "%22");
        for path in [
            format!("/lfs/uploads?limit={query}"),
            format!("/lfs/uploads/{UNKNOWN}?wait={query}"),
            format!("/lfs/uploads/{UNKNOWN}?version={query}"),
        ] {
            assert_refused(broker.get(&path).await, &path);
        }
        tried += 6;
    }
    println!("numbers: {tried} requests");
}

#[tokio::test]
async fn a_client_cannot_set_members_that_the_broker_assigns() {
    let broker = TestBroker::start().await;
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
            let mut body = json!({"topic": broker.topic, "size": 1, "sha256": sha256(b"x")});
            body.as_object_mut().unwrap().insert(member.to_owned(), value.clone());
            let response = broker.post("/lfs/uploads", &body).await.expect_problem(422, "validation-failed");
            assert!(response.text.contains(&format!("/{member}")), "{member}: {}", response.text);
            for (method, path) in [
                ("POST", format!("/lfs/uploads/{UNKNOWN}/complete")),
                ("PUT", "/lfs/topics/t".to_owned()),
                ("POST", format!("/lfs/uploads/{UNKNOWN}/parts")),
            ] {
                let is_known = method == "PUT" && member == "bucket";
                if !is_known {
                    broker
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
        assert_refused(broker.get(&format!("/lfs/uploads?{query}")).await, query);
        tried += 1;
    }
    println!("mass assignment: {tried} requests");
}
