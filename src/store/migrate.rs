//! Migrations of a database that brokers are working on.
//!
//! A migration that waits for a table's lock makes every later write wait behind it. So it waits briefly, lets the others
//! pass, and tries again. Indexes of large tables are built concurrently: writing goes on meanwhile.

use std::time::{Duration, Instant};

use sqlx::migrate::{Migrate as _, MigrateError, Migration, Migrator};
use sqlx::{AssertSqlSafe, PgConnection, query, query_scalar, raw_sql};
use tracing::{info, warn};

use super::Error;

static MIGRATIONS: Migrator = sqlx::migrate!();

/// How long a migration waits for a table's lock, and with it whoever comes after.
const LOCK_WITHIN: &str = "1s";
/// How long others pass before it tries again.
const PAUSE: Duration = Duration::from_secs(1);
/// A lock that is held longer needs an operator.
const GIVE_UP: Duration = Duration::from_secs(3600);
/// One migrates at a time: `lfs_mig` in ASCII.
const TURN: i64 = 0x6c_6673_5f6d_6967;
/// Builds indexes of tables that may be large by now, though it was written for small ones.
const PLAIN_INDEXES: i64 = 2;

/// The schema that this program needs.
pub(super) fn needed() -> i64 {
    MIGRATIONS.iter().map(|migration| migration.version).max().unwrap_or(0)
}

/// Brings the schema up to date. Several may run at once.
pub(super) async fn run(connection: &mut PgConnection) -> Result<(), Error> {
    let begun = Instant::now();
    loop {
        match attempt(connection).await {
            Err(error) if is_passing(&error) && begun.elapsed() < GIVE_UP => {
                warn!(%error, "a migration did not get a lock, tries again in {} s: {error}", PAUSE.as_secs());
                tokio::time::sleep(PAUSE).await;
            }
            ended => return ended,
        }
    }
}

/// Whether it is worth trying again: 55P03 is a lock that was not to be had, 40P01 a deadlock (PostgreSQL, appendix A).
fn is_passing(error: &Error) -> bool {
    let cause = match error {
        Error::Busy => return true,
        Error::Database(cause) | Error::Migration(MigrateError::Execute(cause) | MigrateError::ExecuteMigration(cause, _)) => {
            cause
        }
        _ => return false,
    };
    cause.as_database_error().and_then(|cause| cause.code()).is_some_and(|code| code == "55P03" || code == "40P01")
}

async fn attempt(connection: &mut PgConnection) -> Result<(), Error> {
    // It asks, and does not wait in PostgreSQL: an index that another builds concurrently waits for every statement that runs.
    let ours = query_scalar::<_, bool>("select pg_try_advisory_lock($1)").bind(TURN).fetch_one(&mut *connection).await?;
    if !ours {
        return Err(Error::Busy);
    }
    let applied = apply(connection).await;
    query("select pg_advisory_unlock($1)").bind(TURN).execute(&mut *connection).await?;
    applied
}

async fn apply(connection: &mut PgConnection) -> Result<(), Error> {
    let mut all = Migrator::with_migrations(MIGRATIONS.iter().cloned().collect());
    // The lock of ours is held.
    all.set_locking(false);
    let table = &all.table_name;
    wait_for_locks(connection, LOCK_WITHIN).await?;
    connection.ensure_migrations_table(table).await?;
    let applied = connection.list_applied_migrations(table).await?;
    drop_broken_indexes(connection).await?;
    for migration in MIGRATIONS.iter().filter(|migration| applied.iter().all(|applied| applied.version != migration.version)) {
        if migration.version == PLAIN_INDEXES {
            build_concurrently(connection, migration).await?;
            connection.skip(table, migration).await?;
            continue;
        }
        // It blocks nobody, and must wait for every transaction that is older.
        wait_for_locks(connection, if migration.no_tx { "0" } else { LOCK_WITHIN }).await?;
        connection.apply(table, migration).await?;
    }
    // Nothing is left to do, but what was applied is held against what this program knows.
    all.run(connection).await?;
    Ok(())
}

async fn wait_for_locks(connection: &mut PgConnection, time: &str) -> Result<(), Error> {
    query("select set_config('lock_timeout', $1, false)").bind(time).execute(connection).await?;
    Ok(())
}

/// The statements of a migration that builds indexes, one by one, without blocking writes.
async fn build_concurrently(connection: &mut PgConnection, migration: &Migration) -> Result<(), Error> {
    for statement in migration.sql.as_str().split(";\n") {
        let statement = statement.replace("create index ", "create index concurrently if not exists ");
        wait_for_locks(connection, if statement.contains("create index ") { "0" } else { LOCK_WITHIN }).await?;
        raw_sql(AssertSqlSafe(statement)).execute(&mut *connection).await?;
    }
    Ok(())
}

/// Removes what a concurrent build of an index left that did not come to its end: PostgreSQL never uses it.
async fn drop_broken_indexes(connection: &mut PgConnection) -> Result<(), Error> {
    let broken = "select c.relname::text from pg_index i join pg_class c on c.oid = i.indexrelid
                  where not i.indisvalid and pg_table_is_visible(i.indrelid)";
    let broken: Vec<String> = query_scalar(broken).fetch_all(&mut *connection).await?;
    let is_ours = |name: &str| MIGRATIONS.iter().any(|migration| migration.sql.as_str().contains(&format!(" {name} on ")));
    for name in broken.into_iter().filter(|name| is_ours(name)) {
        info!(index = name, "removing index {name}, whose building was broken off");
        wait_for_locks(connection, "0").await?;
        let drop = format!("drop index concurrently if exists \"{name}\"");
        raw_sql(AssertSqlSafe(drop)).execute(&mut *connection).await?;
    }
    Ok(())
}
