//! Failpoints: named places between two side effects, where a test kills the broker, fails it or holds it up.
//!
//! Each stands where the table of crashes in `docs/architecture.md` has a row. They exist in builds of the tests only: without the
//! feature `failpoints` of the crate `fail`, which a release never has, reaching one is nothing at all.

use std::time::Duration;

/// A failpoint struck: what was done before it is done, and its caller hears that it was not.
#[derive(Debug, thiserror::Error)]
#[error("failpoint {0}")]
pub(crate) struct Struck(&'static str);

/// Reaches a failpoint. What happens there is the environment's `FAILPOINTS`, for example
/// `relay.sent=1*return(kill)`: the process dies as by `kill -9`. `return(error)` fails it, `return(500)` holds it up
/// for so many milliseconds, and `1*` does it only the first time.
pub(crate) async fn reach(name: &'static str) -> Result<(), Struck> {
    let Some(action) = asked(name) else { return Ok(()) };
    tracing::warn!(failpoint = name, "reached failpoint {name}: {action}");
    match action.as_str() {
        // No destructor runs, nothing is flushed or given back.
        "kill" => std::process::abort(),
        "error" => Err(Struck(name)),
        milliseconds => {
            let held_up = milliseconds.parse().unwrap_or_else(|_| panic!("failpoint {name} cannot {milliseconds}"));
            tokio::time::sleep(Duration::from_millis(held_up)).await;
            Ok(())
        }
    }
}

#[allow(unused_variables, reason = "the macro is empty where there are no failpoints")]
fn asked(name: &str) -> Option<String> {
    fail::fail_point!(name, |action| action);
    None
}
