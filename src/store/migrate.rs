//! Migrates the schema while brokers use the database.
//!
//! While a migration waits for a table lock, every later write to the table waits too. So a migration waits briefly, lets the
//! writes run, and retries. Indexes of large tables are built concurrently, so writes continue meanwhile.

use std::time::{Duration, Instant};

use sqlx::migrate::{Migrate as _, MigrateError, Migration, Migrator};
use sqlx::{AssertSqlSafe, PgConnection, query, query_scalar, raw_sql};
use tracing::{info, warn};

use super::Error;

static MIGRATIONS: Migrator = sqlx::migrate!();

/// How long a migration waits for a table lock. Later writes to the table wait for the same time.
const LOCK_TIMEOUT: &str = "1s";
/// How long other writes run before the migration retries.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// After this time the migration fails: a lock that is held for so long needs an operator.
const MAX_RETRY_TIME: Duration = Duration::from_secs(3600);
/// The advisory lock that lets one process migrate at a time; its id is `lfs_mig` in ASCII.
const ADVISORY_LOCK_ID: i64 = 0x6c_6673_5f6d_6967;
/// The migration that was written with plain `create index` statements. Its tables may be large by now, so its indexes are
/// built concurrently.
const INDEX_MIGRATION: i64 = 2;

/// The schema version that this program requires.
pub(super) fn required_version() -> i64 {
    MIGRATIONS.iter().map(|migration| migration.version).max().unwrap_or(0)
}

/// Applies all missing migrations. Several processes may run it at once.
pub(super) async fn run(connection: &mut PgConnection) -> Result<(), Error> {
    let started_at = Instant::now();
    loop {
        match attempt(connection).await {
            Err(error) if is_transient(&error) && started_at.elapsed() < MAX_RETRY_TIME => {
                warn!(%error, "a migration could not get a lock; retrying in {} s: {error}", RETRY_INTERVAL.as_secs());
                tokio::time::sleep(RETRY_INTERVAL).await;
            }
            outcome => return outcome,
        }
    }
}

/// Whether a retry may succeed. 55P03: lock_not_available. 40P01: deadlock_detected (PostgreSQL, appendix A).
fn is_transient(error: &Error) -> bool {
    let cause = match error {
        Error::LockTimeout => return true,
        Error::Database(cause) | Error::Migration(MigrateError::Execute(cause) | MigrateError::ExecuteMigration(cause, _)) => {
            cause
        }
        _ => return false,
    };
    cause.as_database_error().and_then(|cause| cause.code()).is_some_and(|code| code == "55P03" || code == "40P01")
}

async fn attempt(connection: &mut PgConnection) -> Result<(), Error> {
    // A statement that waits for the lock would block `create index concurrently` of another process, which waits for all
    // running statements. So this only tries to get the lock.
    let is_acquired =
        query_scalar::<_, bool>("select pg_try_advisory_lock($1)").bind(ADVISORY_LOCK_ID).fetch_one(&mut *connection).await?;
    if !is_acquired {
        return Err(Error::LockTimeout);
    }
    let applied = apply(connection).await;
    query("select pg_advisory_unlock($1)").bind(ADVISORY_LOCK_ID).execute(&mut *connection).await?;
    applied
}

async fn apply(connection: &mut PgConnection) -> Result<(), Error> {
    let mut all = Migrator::with_migrations(MIGRATIONS.iter().cloned().collect());
    // `attempt` holds the advisory lock.
    all.set_locking(false);
    let table = &all.table_name;
    set_lock_timeout(connection, LOCK_TIMEOUT).await?;
    connection.ensure_migrations_table(table).await?;
    let applied = connection.list_applied_migrations(table).await?;
    drop_invalid_indexes(connection).await?;
    for migration in MIGRATIONS.iter().filter(|migration| applied.iter().all(|applied| applied.version != migration.version)) {
        if migration.version == INDEX_MIGRATION {
            build_concurrently(connection, migration).await?;
            connection.skip(table, migration).await?;
            continue;
        }
        // A migration without a transaction builds indexes concurrently. It blocks no write and must outwait older transactions.
        set_lock_timeout(connection, if migration.no_tx { "0" } else { LOCK_TIMEOUT }).await?;
        connection.apply(table, migration).await?;
    }
    // Applies nothing more, but checks the applied migrations against those of this program.
    all.run(connection).await?;
    Ok(())
}

async fn set_lock_timeout(connection: &mut PgConnection, time: &str) -> Result<(), Error> {
    query("select set_config('lock_timeout', $1, false)").bind(time).execute(connection).await?;
    Ok(())
}

/// Runs the statements of a migration one by one and builds its indexes concurrently, so that writes continue.
async fn build_concurrently(connection: &mut PgConnection, migration: &Migration) -> Result<(), Error> {
    for statement in migration.sql.as_str().split(";\n") {
        let statement = statement.replace("create index ", "create index concurrently if not exists ");
        set_lock_timeout(connection, if statement.contains("create index ") { "0" } else { LOCK_TIMEOUT }).await?;
        raw_sql(AssertSqlSafe(statement)).execute(&mut *connection).await?;
    }
    Ok(())
}

/// Drops invalid indexes, which an interrupted concurrent build leaves behind: PostgreSQL never uses them.
async fn drop_invalid_indexes(connection: &mut PgConnection) -> Result<(), Error> {
    let invalid = "select c.relname::text from pg_index i join pg_class c on c.oid = i.indexrelid
                  where not i.indisvalid and pg_table_is_visible(i.indrelid)";
    let invalid: Vec<String> = query_scalar(invalid).fetch_all(&mut *connection).await?;
    let is_ours = |name: &str| MIGRATIONS.iter().any(|migration| migration.sql.as_str().contains(&format!(" {name} on ")));
    for name in invalid.into_iter().filter(|name| is_ours(name)) {
        info!(index = name, "dropping the invalid index {name}: its concurrent build was interrupted");
        set_lock_timeout(connection, "0").await?;
        let drop = format!("drop index concurrently if exists \"{name}\"");
        raw_sql(AssertSqlSafe(drop)).execute(&mut *connection).await?;
    }
    Ok(())
}
