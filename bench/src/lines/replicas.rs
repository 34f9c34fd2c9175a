//! Replicas: clients that send each request to the next replica, with two and three replicas beside one. A complete shall take
//! no longer when another replica publishes the pointer, and a watcher shall see it as soon. Under load the replicas wake
//! often anyway, so a lone client also tries each replica alone.

use std::time::{Duration, Instant};

use sqlx::{PgConnection, query_as};

use crate::broker::Broker;
use crate::clients::{BrokerClient, Payload, SMALL_BYTES, Uploads};
use crate::report::{Row, Target};
use crate::servers::Servers;
use crate::{Failure, Run, load};

const DATABASE: &str = "replicas";
const MAX_REPLICAS: usize = 3;
const CLIENTS: usize = 4;
/// The relay's lease of a shard. A new replica shall have its share of the shards after this time.
const LEASE: Duration = Duration::from_secs(3);
const SLOWER: Target = Target::RatioAtMost(1.2);
/// Shards are balanced if no replica has more than one shard more than another.
const BALANCED: Target = Target::ValueAtMost(1.0);

/// The latencies of one number of replicas, and how many shards the fullest replica has more than the emptiest.
#[derive(Default)]
struct Found {
    complete_p50: Vec<f64>,
    complete_p99: Vec<f64>,
    wait_p50: Vec<f64>,
    /// The p50 of a lone client through the slowest replica.
    lone_complete: Vec<f64>,
    /// The p50 of a watcher on the replica after the one that completes, the slowest one.
    lone_wait: Vec<f64>,
    imbalance: Vec<f64>,
}

/// Latencies with one, two and three replicas.
pub(crate) async fn measure(run: &mut Run) -> Result<(), Failure> {
    run.stop_main_broker().await?;
    run.servers.create_database(DATABASE).await?;
    let mut database = run.servers.database(DATABASE).await?;
    let (payload, sample) = (Payload::random(SMALL_BYTES), run.plan.sample);
    let mut found: [Found; MAX_REPLICAS] = Default::default();
    // Each round starts three brokers and waits for their shards: a quick run has the time for one.
    let rounds = if run.plan.is_full { run.plan.rounds } else { 1 };
    for _ in 0..rounds {
        let mut replicas = Vec::new();
        for found in &mut found {
            let name = format!("replica-{}", replicas.len());
            replicas.push(Broker::start(&run.servers, &name, DATABASE, &[]).await?);
            found.imbalance.push(settle(&mut database, replicas.len()).await?);
            measure_replicas(&run.servers, &replicas, &payload, sample, found).await?;
            measure_each(&run.servers, &replicas, &payload, sample, found).await?;
        }
        for replica in replicas {
            replica.stop().await?;
        }
    }
    let [one, others @ ..] = found;
    for (number, found) in (2..).zip(others) {
        let pairs = [
            ("complete, 4 clients, p50", found.complete_p50, &one.complete_p50),
            ("complete, 4 clients, p99", found.complete_p99, &one.complete_p99),
            ("?wait, 4 clients, p50", found.wait_p50, &one.wait_p50),
            ("complete, lone client, p50 through the slowest", found.lone_complete, &one.lone_complete),
            ("?wait, lone client, p50 through the slowest", found.lone_wait, &one.lone_wait),
        ];
        for (measure, values, limit_values) in pairs {
            let row = Row::ratio(format!("{measure}, {number} replicas, ms"), "one replica, ms", values, limit_values.clone());
            run.rows.push(row.target(SLOWER));
        }
        let seconds = LEASE.as_secs();
        let measure = format!("shards of the fullest of {number} replicas minus the emptiest, {seconds} s after it joined");
        run.rows.push(Row::value(measure, found.imbalance).target(BALANCED));
    }
    Ok(())
}

async fn measure_replicas(
    servers: &Servers,
    replicas: &[Broker],
    payload: &Payload,
    sample: Duration,
    found: &mut Found,
) -> Result<(), Failure> {
    let urls: Vec<&str> = replicas.iter().map(Broker::url).collect();
    let client = || BrokerClient::new(&urls, &servers.tokens[..1]);
    let mut clients: Vec<Uploads> =
        (0..CLIENTS).map(|_| Uploads { watcher: Some(client()), ..Uploads::new(client(), payload) }).collect();
    for client in &mut clients {
        load::repeat(client, 2 * replicas.len()).await?;
    }
    Uploads::take_latencies(&mut clients);
    let (_, mut clients) = load::run(clients, sample).await?;
    let (completes, waits) = Uploads::take_latencies(&mut clients);
    found.complete_p50.push(completes.percentile_ms(50));
    found.complete_p99.push(completes.percentile_ms(99));
    found.wait_p50.push(waits.percentile_ms(50));
    Ok(())
}

/// A lone client of each replica, one after the other. Its watcher is on the next replica.
async fn measure_each(
    servers: &Servers,
    replicas: &[Broker],
    payload: &Payload,
    sample: Duration,
    found: &mut Found,
) -> Result<(), Failure> {
    let (mut slowest_complete, mut slowest_wait) = (0.0_f64, 0.0_f64);
    for (number, replica) in replicas.iter().enumerate() {
        let next = &replicas[(number + 1) % replicas.len()];
        let [client, watcher] = [replica, next].map(|replica| BrokerClient::new(&[replica.url()], &servers.tokens[..1]));
        let client = Uploads { watcher: Some(watcher), ..Uploads::new(client, payload) };
        let (_, mut clients) = load::run(vec![client], sample).await?;
        let (completes, waits) = Uploads::take_latencies(&mut clients);
        slowest_complete = slowest_complete.max(completes.percentile_ms(50));
        slowest_wait = slowest_wait.max(waits.percentile_ms(50));
    }
    found.lone_complete.push(slowest_complete);
    found.lone_wait.push(slowest_wait);
    Ok(())
}

/// Waits until the shards are balanced, at most for the length of a lease and a second. Returns how many shards more the replica
/// with the most shards has than the one with the fewest.
async fn settle(database: &mut PgConnection, replicas: usize) -> Result<f64, Failure> {
    let began = Instant::now();
    loop {
        let counts = "select count(*) from relay_shards where owner is not null group by owner order by 1";
        let counts: Vec<(i64,)> = query_as(counts).fetch_all(&mut *database).await?;
        let most = counts.last().map_or(0, |(shards,)| *shards);
        // A replica without a shard has no row.
        let fewest = if counts.len() < replicas { 0 } else { counts.first().map_or(0, |(shards,)| *shards) };
        let is_balanced = most > 0 && most - fewest <= 1;
        if is_balanced || began.elapsed() > LEASE + Duration::from_secs(1) {
            return Ok((most - fewest) as f64);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
