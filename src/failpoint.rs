//! Failpoints: named places between two side effects, where a test kills the broker, injects an error or adds a delay.
//!
//! Each failpoint matches a row of the crash table in `docs/architecture.md`. Failpoints exist in test builds only. A
//! release never enables the feature `failpoints` of the crate `fail`, so [`reach`] does nothing there.

use std::time::Duration;

/// The error that a failpoint injects: the side effect before the failpoint happened, but the caller sees a failure.
#[derive(Debug, thiserror::Error)]
#[error("failpoint {0} injected an error")]
pub(crate) struct InjectedError(&'static str);

/// Runs the action that the environment variable `FAILPOINTS` configures for this failpoint, if any.
///
/// For example `relay.sent=1*return(kill)` kills the process as `kill -9` does. `return(error)` injects an error,
/// `return(500)` waits 500 ms, and `1*` limits an action to the first time.
pub(crate) async fn reach(name: &'static str) -> Result<(), InjectedError> {
    let Some(action) = configured_action(name) else { return Ok(()) };
    tracing::warn!(failpoint = name, "reached failpoint {name}: {action}");
    match action.as_str() {
        // `abort` runs no destructor and flushes no buffer, as in a real crash.
        "kill" => std::process::abort(),
        "error" => Err(InjectedError(name)),
        delay_ms => {
            let delay_ms = delay_ms.parse().unwrap_or_else(|_| {
                panic!("failpoint {name} has the unknown action {delay_ms}: expected kill, error or a number of milliseconds")
            });
            tokio::time::sleep(Duration::from_millis(delay_ms)).await;
            Ok(())
        }
    }
}

#[allow(unused_variables, reason = "without failpoints the macro expands to nothing")]
fn configured_action(name: &str) -> Option<String> {
    fail::fail_point!(name, |action| action);
    None
}
