//! Open: how many uploads a second the broker opens, beside the one-row inserts that PostgreSQL can do.

use crate::clients::{BrokerClient, Opens, Payload, SMALL_BYTES};
use crate::report::{Row, Target, counted};
use crate::servers::TENANTS;
use crate::{Failure, Run, limits, load};

/// Numbers of clients, and the target for each.
const CLIENTS: [(usize, f64); 4] = [(1, 0.5), (8, 0.9), (32, 1.2), (64, 1.2)];
const SLOW_COMMIT_CLIENTS: usize = 64;
/// One commit after the other would be 500 opens a second.
const SLOW_COMMIT: Target = Target::ValueAtLeast(500.0);
/// What an `Idempotency-Key` may cost.
const WITH_KEY: Target = Target::RatioAtLeast(0.9);

/// The opens of one number of tenants, without and with a key, for each round.
struct Series {
    tenants: usize,
    without_key: Vec<f64>,
    with_key: Vec<f64>,
}

/// Opens per second.
pub(crate) async fn measure(run: &mut Run) -> Result<(), Failure> {
    let (plan, payload) = (run.plan, Payload::random(SMALL_BYTES));
    for (clients, target) in CLIENTS {
        let mut inserts = Vec::new();
        let mut series = [1, TENANTS].map(|tenants| Series { tenants, without_key: Vec::new(), with_key: Vec::new() });
        for _ in 0..plan.rounds {
            inserts.push(limits::pgbench_inserts(&run.servers, clients, plan.sample).await?);
            for Series { tenants, without_key, with_key } in &mut series {
                without_key.push(opens(run, &payload, clients, *tenants, false).await?);
                with_key.push(opens(run, &payload, clients, *tenants, true).await?);
            }
        }
        for Series { tenants, without_key, with_key } in series {
            let case = format!("{}, {}", counted(clients, "client"), counted(tenants, "tenant"));
            let open = format!("open, {case}, 1/s");
            let row = Row::ratio(&open, "pgbench insert, 1/s", without_key.clone(), inserts.clone());
            run.rows.push(row.target(Target::RatioAtLeast(target)));
            let row = Row::ratio(format!("open with Idempotency-Key, {case}, 1/s"), "open without", with_key, without_key);
            run.rows.push(row.target(WITH_KEY));
        }
    }
    Ok(())
}

/// Opens of one tenant per second while each commit of PostgreSQL takes 2 ms or more.
pub(crate) async fn measure_slow_commit(run: &mut Run) -> Result<(), Failure> {
    run.main_broker().await?;
    // The process that writes the log waits this long before each write. With no siblings required it always waits.
    run.servers.configure_postgres("commit_siblings", "0").await?;
    run.servers.configure_postgres("commit_delay", "2000").await?;
    let measured = measure_with_slow_commits(run).await;
    run.servers.configure_postgres("commit_delay", "0").await?;
    measured
}

async fn measure_with_slow_commits(run: &mut Run) -> Result<(), Failure> {
    let (plan, payload) = (run.plan, Payload::random(SMALL_BYTES));
    let (mut values, mut inserts) = (Vec::new(), Vec::new());
    for _ in 0..plan.rounds {
        inserts.push(limits::pgbench_inserts(&run.servers, SLOW_COMMIT_CLIENTS, plan.sample).await?);
        values.push(opens(run, &payload, SLOW_COMMIT_CLIENTS, 1, false).await?);
    }
    let measure = format!("open, commits take 2 ms, {}, 1 tenant, 1/s", counted(SLOW_COMMIT_CLIENTS, "client"));
    run.rows.push(Row::ratio(measure, "pgbench insert, 1/s", values, inserts).target(SLOW_COMMIT));
    Ok(())
}

async fn opens(run: &mut Run, payload: &Payload, clients: usize, tenants: usize, with_key: bool) -> Result<f64, Failure> {
    let (tokens, sample) = (run.servers.tokens.clone(), run.plan.sample);
    let url = run.main_broker().await?.url().to_owned();
    let client = |_| Opens { client: BrokerClient::new(&[&url], &tokens[..tenants]), payload: payload.clone(), with_key };
    let (found, _) = load::run((0..clients).map(client).collect(), sample).await?;
    Ok(found.per_second())
}
