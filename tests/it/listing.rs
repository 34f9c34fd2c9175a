//! Lists: filters, pages, and the cursor that belongs to them.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};

use crate::harness::{House, bytes};

/// A list's path with its filters encoded.
fn list(filters: &[(&str, &str)]) -> String {
    let query = form_urlencoded::Serializer::new(String::new()).extend_pairs(filters).finish();
    format!("/lfs/uploads?{query}")
}

async fn ids(house: &House, filters: &[(&str, &str)]) -> Vec<String> {
    let page = house.get(&list(filters)).await.expect(200);
    assert!(page.json["next_cursor"].is_null(), "{}", page.text);
    page.json["items"].as_array().unwrap().iter().map(|item| item["id"].as_str().unwrap().to_owned()).collect()
}

/// Opens some uploads, oldest first.
async fn open_all(house: &House, keys: &[&str]) -> Vec<Value> {
    let mut opened = Vec::new();
    for key in keys {
        opened.push(house.open(b"x", json!({"key": key})).await.expect(201).json);
    }
    opened
}

fn id(upload: &Value) -> String {
    upload["id"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_list_shows_the_newest_first_without_urls_or_parts() {
    let house = House::new().await;
    assert!(ids(&house, &[]).await.is_empty());
    let mut expected: Vec<String> = open_all(&house, &["a", "b"]).await.iter().map(id).collect();
    let content = bytes(6 << 20, 1);
    expected.push(house.open(&content, json!({"part_size": 5 << 20})).await.expect(201).id());
    expected.push(house.publish(b"hello", json!({"key_base64": "/w=="})).await.id());
    expected.reverse();
    assert_eq!(ids(&house, &[]).await, expected);

    let page = house.get("/lfs/uploads").await.expect(200);
    assert_eq!(page.json.as_object().unwrap().keys().collect::<Vec<_>>(), ["items", "next_cursor"]);
    for item in page.json["items"].as_array().unwrap() {
        for absent in ["upload", "parts", "uploaded_parts", "missing_parts"] {
            assert!(item.get(absent).is_none(), "{absent} in {item}");
        }
        // Everything else that a list says, a reading says alike.
        let read = house.upload(&id(item)).await.expect(200).json;
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
    let house = House::new().await;
    let other_topic = format!("{}-other", house.topic);
    house.make_topic(&other_topic, 1).await;
    let open = open_all(&house, &["order-1", "order-2", "Order-3"]).await;
    let other = house.open(b"x", json!({"topic": other_topic, "key": "order-4"})).await.expect(201).json;
    let keyless = house.open(b"x", json!({})).await.expect(201).json;
    house.delete(&format!("/lfs/uploads/{}", id(&open[1]))).await.expect(204);
    let published = house.publish(b"y", json!({"key": "zebra"})).await.json;

    assert_eq!(ids(&house, &[("topic", &other_topic)]).await, [id(&other)]);
    assert_eq!(ids(&house, &[("state", "aborted")]).await, [id(&open[1])]);
    assert_eq!(ids(&house, &[("state", "aborted"), ("state", "published")]).await, [id(&published), id(&open[1])]);
    assert_eq!(ids(&house, &[("key_prefix", "order-")]).await, [id(&other), id(&open[1]), id(&open[0])]);
    assert_eq!(ids(&house, &[("key_prefix", "order-"), ("state", "open"), ("topic", &house.topic)]).await, [id(&open[0])]);
    assert!(ids(&house, &[("key_prefix", "%")]).await.is_empty());
    assert_eq!(ids(&house, &[("tenant", "default"), ("topic", &other_topic)]).await, [id(&other)]);
    assert!(ids(&house, &[("tenant", "another")]).await.is_empty());

    let at = keyless["created_at"].as_str().unwrap();
    assert_eq!(ids(&house, &[("created_after", at)]).await, [id(&published), id(&keyless)]);
    let before = ids(&house, &[("created_before", at)]).await;
    assert_eq!(before, [id(&other), id(&open[2]), id(&open[1]), id(&open[0])]);
    assert!(ids(&house, &[("created_after", at), ("created_before", at)]).await.is_empty());
}

#[tokio::test]
async fn a_filter_that_is_none_or_has_no_sense_is_named() {
    let house = House::new().await;
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
        let answer = house.get(&list(&[(name, value)])).await.expect_problem(422, "validation-failed");
        assert_eq!(answer.json["errors"][0]["pointer"], format!("/{name}"), "{}", answer.text);
    }
    house.get(&list(&[("topic", "a"), ("topic", "b")])).await.expect_problem(422, "validation-failed");
    for limit in ["1", "200"] {
        house.get(&list(&[("limit", limit)])).await.expect(200);
    }
}

#[tokio::test]
async fn a_cursor_goes_on_with_its_own_filters_only() {
    let house = House::new().await;
    open_all(&house, &["a", "b", "c"]).await;
    let filters = [("topic", house.topic.as_str()), ("state", "open"), ("state", "aborted"), ("limit", "1")];
    let cursor = house.get(&list(&filters)).await.expect(200).json["next_cursor"].as_str().unwrap().to_owned();
    let with = |filters: &[(&str, &str)]| list(&[filters, &[("cursor", cursor.as_str())]].concat());
    let second = house.get(&with(&filters)).await.expect(200);
    assert_eq!(second.json["items"][0]["key"], "b");
    // The same filters, written in another order, with another page size.
    let reordered = [("state", "aborted"), ("limit", "2"), ("state", "open"), ("topic", house.topic.as_str())];
    assert_eq!(house.get(&with(&reordered)).await.expect(200).json["items"].as_array().unwrap().len(), 2);
    for others in [
        vec![],
        vec![("topic", "other"), ("state", "open"), ("state", "aborted")],
        vec![("topic", house.topic.as_str()), ("state", "open")],
        vec![("topic", house.topic.as_str()), ("state", "open"), ("state", "aborted"), ("key_prefix", "a")],
    ] {
        house.get(&with(&others)).await.expect_problem(422, "validation-failed");
    }
    // Another first character, whatever it was.
    let first = if cursor.starts_with('_') { 'A' } else { '_' };
    let forged = format!("{first}{}", &cursor[1..]);
    house.get(&list(&[&filters[..], &[("cursor", &forged)]].concat())).await.expect_problem(422, "validation-failed");
}

/// All pages of a list, put together.
async fn pages(house: &House, filters: &[(&str, &str)], limit: usize) -> Vec<String> {
    let (mut all, mut cursor) = (Vec::new(), None::<String>);
    let limit_text = limit.to_string();
    for _ in 0..100 {
        let mut query = [filters, &[("limit", limit_text.as_str())]].concat();
        if let Some(cursor) = &cursor {
            query.push(("cursor", cursor));
        }
        let page = house.get(&list(&query)).await.expect(200).json;
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
async fn pages_put_together_are_the_whole_whatever_their_size() {
    let house = House::new().await;
    let keys: Vec<String> = (0..30).map(|n| format!("{}-{n}", if n % 3 == 0 { "a" } else { "b" })).collect();
    open_all(&house, &keys.iter().map(String::as_str).collect::<Vec<_>>()).await;
    // Sessions of one instant are told apart by their ids.
    sqlx::query("update upload_sessions set created_at = date_trunc('second', created_at)").execute(&house.db).await.unwrap();
    let mut runner = TestRunner::new(Config { cases: 12, failure_persistence: None, ..Config::default() });
    let runtime = tokio::runtime::Handle::current();
    let outcome = tokio::task::block_in_place(|| {
        runner.run(&(1usize..=35, proptest::option::of("[ab]")), |(limit, prefix)| {
            runtime.block_on(async {
                let filters: Vec<(&str, &str)> = prefix.as_deref().map(|prefix| ("key_prefix", prefix)).into_iter().collect();
                let whole = ids(&house, &filters).await;
                prop_assert_eq!(
                    whole.len(),
                    match prefix.as_deref() {
                        None => 30,
                        Some("a") => 10,
                        Some(_) => 20,
                    }
                );
                prop_assert_eq!(pages(&house, &filters, limit).await, whole);
                Ok(())
            })
        })
    });
    outcome.unwrap();
}

#[tokio::test]
async fn what_opens_while_pages_are_turned_moves_nothing() {
    let house = House::new().await;
    let before: Vec<String> = open_all(&house, &["a", "b", "c", "d"]).await.iter().rev().map(id).collect();
    let first = house.get(&list(&[("limit", "2")])).await.expect(200).json;
    open_all(&house, &["e", "f"]).await;
    let second = house.get(&list(&[("limit", "2"), ("cursor", first["next_cursor"].as_str().unwrap())])).await.expect(200).json;
    let seen: Vec<String> = [&first, &second].iter().flat_map(|page| page["items"].as_array().unwrap().iter().map(id)).collect();
    assert_eq!(seen, before);
    assert!(second["next_cursor"].is_null());
}
