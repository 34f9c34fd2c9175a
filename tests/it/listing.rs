//! Lists of uploads: filters, pages, and cursors.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};

use crate::harness::{TestBroker, bytes};

/// The path of a list with these filters.
fn list(filters: &[(&str, &str)]) -> String {
    let query = form_urlencoded::Serializer::new(String::new()).extend_pairs(filters).finish();
    format!("/lfs/uploads?{query}")
}

async fn ids(broker: &TestBroker, filters: &[(&str, &str)]) -> Vec<String> {
    let page = broker.get(&list(filters)).await.expect(200);
    assert!(page.json["next_cursor"].is_null(), "{}", page.text);
    page.json["items"].as_array().unwrap().iter().map(|item| item["id"].as_str().unwrap().to_owned()).collect()
}

/// Opens uploads with these keys, oldest first.
async fn open_all(broker: &TestBroker, keys: &[&str]) -> Vec<Value> {
    let mut opened = Vec::new();
    for key in keys {
        opened.push(broker.open(b"x", json!({"key": key})).await.expect(201).json);
    }
    opened
}

fn id(upload: &Value) -> String {
    upload["id"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_list_shows_the_newest_first_without_urls_or_parts() {
    let broker = TestBroker::start().await;
    assert!(ids(&broker, &[]).await.is_empty());
    let mut expected: Vec<String> = open_all(&broker, &["a", "b"]).await.iter().map(id).collect();
    let content = bytes(6 << 20, 1);
    expected.push(broker.open(&content, json!({"part_size": 5 << 20})).await.expect(201).id());
    expected.push(broker.publish(b"hello", json!({"key_base64": "/w=="})).await.id());
    expected.reverse();
    assert_eq!(ids(&broker, &[]).await, expected);

    let page = broker.get("/lfs/uploads").await.expect(200);
    assert_eq!(page.json.as_object().unwrap().keys().collect::<Vec<_>>(), ["items", "next_cursor"]);
    for item in page.json["items"].as_array().unwrap() {
        for absent in ["upload", "parts", "uploaded_parts", "missing_parts"] {
            assert!(item.get(absent).is_none(), "{absent} in {item}");
        }
        // The upload itself shows every other member with the same value.
        let read = broker.upload(&id(item)).await.expect(200).json;
        for (name, value) in item.as_object().unwrap().iter().filter(|(name, _)| *name != "expires_in") {
            assert_eq!(&read[name], value, "{name}");
        }
    }
    let published = &page.json["items"][0];
    assert_eq!(
        (&published["state"], &published["key_base64"], &published["next"]),
        (&json!("published"), &json!("/w=="), &json!("none"))
    );
    assert_eq!(published["pointer"]["kfs_lfs"], 1);
    assert!(!page.text.contains("X-Amz-"));
}

#[tokio::test]
async fn filters_narrow_a_list_alone_and_together() {
    let broker = TestBroker::start().await;
    let other_topic = format!("{}-other", broker.topic);
    broker.create_topic(&other_topic, 1).await;
    let open = open_all(&broker, &["order-1", "order-2", "Order-3"]).await;
    let other = broker.open(b"x", json!({"topic": other_topic, "key": "order-4"})).await.expect(201).json;
    let keyless = broker.open(b"x", json!({})).await.expect(201).json;
    broker.delete(&format!("/lfs/uploads/{}", id(&open[1]))).await.expect(204);
    let published = broker.publish(b"y", json!({"key": "zebra"})).await.json;

    assert_eq!(ids(&broker, &[("topic", &other_topic)]).await, [id(&other)]);
    assert_eq!(ids(&broker, &[("state", "aborted")]).await, [id(&open[1])]);
    assert_eq!(ids(&broker, &[("state", "aborted"), ("state", "published")]).await, [id(&published), id(&open[1])]);
    assert_eq!(ids(&broker, &[("key_prefix", "order-")]).await, [id(&other), id(&open[1]), id(&open[0])]);
    assert_eq!(ids(&broker, &[("key_prefix", "order-"), ("state", "open"), ("topic", &broker.topic)]).await, [id(&open[0])]);
    assert!(ids(&broker, &[("key_prefix", "%")]).await.is_empty());
    assert_eq!(ids(&broker, &[("tenant", "default"), ("topic", &other_topic)]).await, [id(&other)]);
    assert!(ids(&broker, &[("tenant", "another")]).await.is_empty());

    let at = keyless["created_at"].as_str().unwrap();
    assert_eq!(ids(&broker, &[("created_after", at)]).await, [id(&published), id(&keyless)]);
    let before = ids(&broker, &[("created_before", at)]).await;
    assert_eq!(before, [id(&other), id(&open[2]), id(&open[1]), id(&open[0])]);
    assert!(ids(&broker, &[("created_after", at), ("created_before", at)]).await.is_empty());
}

#[tokio::test]
async fn an_unknown_or_invalid_filter_is_named() {
    let broker = TestBroker::start().await;
    for (name, value) in [
        ("limit", "0"),
        ("limit", "201"),
        ("limit", "-1"),
        ("limit", "many"),
        ("state", "done"),
        ("state", ""),
        ("created_after", "yesterday"),
        ("created_before", "2026-11-21"),
        ("cursor", "nonsense"),
        ("cursor", ""),
        ("nonsense", "1"),
        ("states", "open"),
    ] {
        let response = broker.get(&list(&[(name, value)])).await.expect_problem(422, "validation-failed");
        assert_eq!(response.json["errors"][0]["pointer"], format!("/{name}"), "{}", response.text);
    }
    broker.get(&list(&[("topic", "a"), ("topic", "b")])).await.expect_problem(422, "validation-failed");
    for limit in ["1", "200"] {
        broker.get(&list(&[("limit", limit)])).await.expect(200);
    }
}

#[tokio::test]
async fn a_cursor_continues_only_with_its_own_filters() {
    let broker = TestBroker::start().await;
    open_all(&broker, &["a", "b", "c"]).await;
    let filters = [("topic", broker.topic.as_str()), ("state", "open"), ("state", "aborted"), ("limit", "1")];
    let cursor = broker.get(&list(&filters)).await.expect(200).json["next_cursor"].as_str().unwrap().to_owned();
    let with = |filters: &[(&str, &str)]| list(&[filters, &[("cursor", cursor.as_str())]].concat());
    let second = broker.get(&with(&filters)).await.expect(200);
    assert_eq!(second.json["items"][0]["key"], "b");
    // The same filters in another order, with another page size.
    let reordered = [("state", "aborted"), ("limit", "2"), ("state", "open"), ("topic", broker.topic.as_str())];
    assert_eq!(broker.get(&with(&reordered)).await.expect(200).json["items"].as_array().unwrap().len(), 2);
    for others in [
        vec![],
        vec![("topic", "other"), ("state", "open"), ("state", "aborted")],
        vec![("topic", broker.topic.as_str()), ("state", "open")],
        vec![("topic", broker.topic.as_str()), ("state", "open"), ("state", "aborted"), ("key_prefix", "a")],
    ] {
        broker.get(&with(&others)).await.expect_problem(422, "validation-failed");
    }
    // The cursor with another first character.
    let first = if cursor.starts_with('_') { 'A' } else { '_' };
    let forged = format!("{first}{}", &cursor[1..]);
    broker.get(&list(&[&filters[..], &[("cursor", &forged)]].concat())).await.expect_problem(422, "validation-failed");
}

/// The ids of all pages of a list.
async fn pages(broker: &TestBroker, filters: &[(&str, &str)], limit: usize) -> Vec<String> {
    let (mut all, mut cursor) = (Vec::new(), None::<String>);
    let limit_text = limit.to_string();
    for _ in 0..100 {
        let mut query = [filters, &[("limit", limit_text.as_str())]].concat();
        if let Some(cursor) = &cursor {
            query.push(("cursor", cursor));
        }
        let page = broker.get(&list(&query)).await.expect(200).json;
        let items = page["items"].as_array().unwrap();
        assert!(items.len() <= limit);
        all.extend(items.iter().map(id));
        match page["next_cursor"].as_str() {
            Some(next) => {
                assert_eq!(items.len(), limit, "only the last page is short");
                cursor = Some(next.to_owned());
            }
            None => return all,
        }
    }
    panic!("the list does not end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_pages_together_are_the_whole_list_for_any_page_size() {
    let broker = TestBroker::start().await;
    let keys: Vec<String> = (0..30).map(|n| format!("{}-{n}", if n % 3 == 0 { "a" } else { "b" })).collect();
    open_all(&broker, &keys.iter().map(String::as_str).collect::<Vec<_>>()).await;
    // Sessions with the same creation time are ordered by their ids.
    sqlx::query("update upload_sessions set created_at = date_trunc('second', created_at)").execute(&broker.db).await.unwrap();
    let mut runner = TestRunner::new(Config { cases: 12, failure_persistence: None, ..Config::default() });
    let runtime = tokio::runtime::Handle::current();
    let outcome = tokio::task::block_in_place(|| {
        runner.run(&(1usize..=35, proptest::option::of("[ab]")), |(limit, prefix)| {
            runtime.block_on(async {
                let filters: Vec<(&str, &str)> = prefix.as_deref().map(|prefix| ("key_prefix", prefix)).into_iter().collect();
                let whole = ids(&broker, &filters).await;
                prop_assert_eq!(
                    whole.len(),
                    match prefix.as_deref() {
                        None => 30,
                        Some("a") => 10,
                        Some(_) => 20,
                    }
                );
                prop_assert_eq!(pages(&broker, &filters, limit).await, whole);
                Ok(())
            })
        })
    });
    outcome.unwrap();
}

#[tokio::test]
async fn uploads_opened_between_two_pages_do_not_change_the_later_page() {
    let broker = TestBroker::start().await;
    let before: Vec<String> = open_all(&broker, &["a", "b", "c", "d"]).await.iter().rev().map(id).collect();
    let first = broker.get(&list(&[("limit", "2")])).await.expect(200).json;
    open_all(&broker, &["e", "f"]).await;
    let second = broker.get(&list(&[("limit", "2"), ("cursor", first["next_cursor"].as_str().unwrap())])).await.expect(200).json;
    let seen: Vec<String> = [&first, &second].iter().flat_map(|page| page["items"].as_array().unwrap().iter().map(id)).collect();
    assert_eq!(seen, before);
    assert!(second["next_cursor"].is_null());
}
