//! Resolve beside a HEAD, and the cost of signing part URLs beside the signature alone.

use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::Method;
use serde::Deserialize;

use crate::clients::{BrokerClient, Payload, SMALL_BYTES, SameRequest};
use crate::limits::Heads;
use crate::report::Row;
use crate::{Failure, Run, load};

const CLIENTS: usize = 8;
/// The parts of one request, and of the upload: 5 MiB each.
const PARTS: u64 = 100;
const PART_BYTES: u64 = 5 << 20;

#[derive(Deserialize)]
struct Created {
    id: String,
}

/// Resolves per second.
pub(crate) async fn measure(run: &mut Run) -> Result<(), Failure> {
    let (plan, payload, tokens) = (run.plan, Payload::random(SMALL_BYTES), run.servers.tokens.clone());
    let url = run.main_broker().await?.url().to_owned();
    let client = || BrokerClient::new(&[&url], &tokens[..1]);
    let completed: serde_json::Value = client().upload(&payload).await?.json()?;
    let body = Bytes::from(completed["pointer"].to_string());
    let resolve = |_| SameRequest { client: client(), method: Method::POST, path: "/lfs/resolve".to_owned(), body: body.clone() };
    let mut resolving: Vec<_> = (0..CLIENTS).map(resolve).collect();
    let mut heads = Heads::clients(&run.servers, &payload, CLIENTS).await?;
    let (mut values, mut limit_values) = (Vec::new(), Vec::new());
    for _ in 0..plan.rounds {
        let found;
        (found, heads) = load::run(heads, plan.sample).await?;
        limit_values.push(found.per_second());
        let found;
        (found, resolving) = load::run(resolving, plan.sample).await?;
        values.push(found.per_second());
    }
    run.rows.push(Row::ratio(format!("resolve, {CLIENTS} clients, 1/s"), "HEAD, 1/s", values, limit_values));
    Ok(())
}

/// The CPU time of the broker for one part URL.
pub(crate) async fn measure_presign(run: &mut Run) -> Result<(), Failure> {
    let (plan, tokens, bucket) = (run.plan, run.servers.tokens.clone(), run.servers.bucket.clone());
    let url = run.main_broker().await?.url().to_owned();
    let mut client = BrokerClient::new(&[&url], &tokens[..1]);
    let (topic, size) = (crate::servers::TOPIC, PARTS * PART_BYTES);
    let open = format!(r#"{{"topic":"{topic}","size":{size},"part_size":{PART_BYTES},"sha256":"{}"}}"#, "0".repeat(64));
    let opened = client.call(Method::POST, "/lfs/uploads", 0, &[], open.into()).await?.expect(&[201])?;
    let path = format!("/lfs/uploads/{}/parts", opened.json::<Created>()?.id);
    let numbers: Vec<u64> = (1..=PARTS).collect();
    let body = Bytes::from(format!(r#"{{"part_numbers":{numbers:?}}}"#));
    let mut signing = vec![SameRequest { client, method: Method::POST, path, body }];
    let (mut values, mut limit_values) = (Vec::new(), Vec::new());
    for _ in 0..plan.rounds {
        let (began, mut signed) = (Instant::now(), 0_u32);
        while began.elapsed() < plan.sample {
            let target = format!("tenant/topic/lfs/2026/11/28/0?partNumber={}&uploadId=0", signed % 100);
            bucket.presign("PUT", &target, &[("content-length", "5242880")])?;
            signed += 1;
        }
        limit_values.push(microseconds(began.elapsed()) / f64::from(signed));
        let broker = run.main_broker().await?;
        let cpu = broker.cpu()?;
        let found;
        (found, signing) = load::run(signing, plan.sample).await?;
        values.push(microseconds(broker.cpu()?.saturating_sub(cpu)) / (found.count() as f64 * PARTS as f64));
    }
    run.rows.push(Row::ratio("broker CPU for one part URL, µs", "one signature in a loop, µs", values, limit_values));
    Ok(())
}

fn microseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1_000_000.0
}
