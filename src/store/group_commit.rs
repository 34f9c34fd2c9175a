//! Group commit: calls of one tenant that arrive while a statement of that tenant is under way go together in the next one.
//!
//! All calls that open or end an upload change the tenant's quota row, so they wait for each other's commit. Together they
//! wait for one commit. A lone call does not wait. A group is of one tenant, so no tenant waits for another's calls.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::Error;

/// The most calls in one statement. More would not be faster, and a failure would repeat more of them.
const MAX_GROUP_CALLS: usize = 64;

/// The waiting calls of each tenant that has a statement under way.
pub(super) struct GroupCommit<C, R>(Arc<Mutex<Queues<C, R>>>);

/// The waiting calls by tenant.
type Queues<C, R> = HashMap<String, Vec<Waiting<C, R>>>;

struct Waiting<C, R> {
    call: C,
    answer: oneshot::Sender<Result<R, Error>>,
}

impl<C, R> Clone for GroupCommit<C, R> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<C, R> Default for GroupCommit<C, R> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<C: Send + 'static, R: Send + 'static> GroupCommit<C, R> {
    /// Runs `call` with other calls of the tenant. `run` gets a group and returns one result for each of its calls, in order.
    /// A caller that goes away before its group starts takes its call with it.
    pub(super) async fn run<F>(&self, tenant: &str, call: C, run: impl Fn(Vec<C>) -> F + Send + 'static) -> Result<R, Error>
    where
        F: Future<Output = Vec<Result<R, Error>>> + Send,
    {
        let (answer, answered) = oneshot::channel();
        let waiting = Waiting { call, answer };
        let is_first = match self.waiting().entry(tenant.to_owned()) {
            std::collections::hash_map::Entry::Occupied(mut queue) => {
                queue.get_mut().push(waiting);
                false
            }
            std::collections::hash_map::Entry::Vacant(queue) => {
                queue.insert(vec![waiting]);
                true
            }
        };
        if is_first {
            // A task of its own: a caller that goes away must not stop the others' calls.
            let queue = Queue { groups: self.clone(), tenant: tenant.to_owned() };
            tokio::spawn(async move {
                while let Some(group) = queue.next_group() {
                    let (calls, answers): (Vec<C>, Vec<_>) =
                        group.into_iter().map(|waiting| (waiting.call, waiting.answer)).unzip();
                    for (answer, result) in answers.into_iter().zip(run(calls).await) {
                        // This fails if the caller has gone away.
                        let _ = answer.send(result);
                    }
                }
            });
        }
        answered.await.unwrap_or(Err(Error::ShuttingDown))
    }

    fn waiting(&self) -> MutexGuard<'_, Queues<C, R>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The queue of a tenant, while one task serves it.
struct Queue<C: Send + 'static, R: Send + 'static> {
    groups: GroupCommit<C, R>,
    tenant: String,
}

impl<C: Send + 'static, R: Send + 'static> Queue<C, R> {
    /// The next group; `None` once no call waits. Then the tenant's next call starts a new task.
    fn next_group(&self) -> Option<Vec<Waiting<C, R>>> {
        let mut waiting = self.groups.waiting();
        let queue = waiting.get_mut(&self.tenant)?;
        queue.retain(|waiting| !waiting.answer.is_closed());
        if queue.is_empty() {
            waiting.remove(&self.tenant);
            return None;
        }
        let size = queue.len().min(MAX_GROUP_CALLS);
        Some(queue.drain(..size).collect())
    }
}

impl<C: Send + 'static, R: Send + 'static> Drop for Queue<C, R> {
    /// After a panic no task serves the queue, so its callers get an error.
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.groups.waiting().remove(&self.tenant);
        }
    }
}

/// Whether one call of a group may be the cause of its error, so that the other calls may succeed without it.
pub(super) fn may_be_one_calls_fault(error: &sqlx::Error) -> bool {
    match error.as_database_error().and_then(|error| error.code()) {
        // Classes of PostgreSQL's appendix A that concern the whole server or connection: 08 connection, 53 resources, 57
        // shutdown or cancelled. 55P03, lock_not_available: the tenant's row is locked, which every call needs.
        Some(code) => code != "55P03" && !["08", "53", "57"].iter().any(|class| code.starts_with(class)),
        None => false,
    }
}

/// The same error for each call of a group. An error of the connection cannot be copied, but its words can.
pub(super) fn for_each_call<R>(error: &sqlx::Error, calls: usize) -> Vec<Result<R, Error>> {
    let copy = || match error {
        sqlx::Error::PoolTimedOut => sqlx::Error::PoolTimedOut,
        sqlx::Error::PoolClosed => sqlx::Error::PoolClosed,
        sqlx::Error::Io(error) => sqlx::Error::Io(std::io::Error::new(error.kind(), error.to_string())),
        error => sqlx::Error::Io(std::io::Error::other(error.to_string())),
    };
    (0..calls).map(|_| Err(copy().into())).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::FutureExt as _;
    use tokio::sync::Semaphore;

    use super::*;

    /// Answers each call with the size of its group, once `gate` opens for the group.
    async fn size_of_group(calls: Vec<u8>, gate: Arc<Semaphore>) -> Vec<Result<usize, Error>> {
        gate.acquire().await.unwrap().forget();
        assert!(!calls.contains(&u8::MAX), "a bug");
        calls.iter().map(|_| Ok(calls.len())).collect()
    }

    #[tokio::test]
    async fn calls_that_arrive_during_a_statement_go_together_in_the_next_one() {
        let (groups, gate) = (GroupCommit::default(), Arc::new(Semaphore::new(0)));
        let run = || {
            let gate = Arc::clone(&gate);
            move |calls| size_of_group(calls, Arc::clone(&gate))
        };
        let mut first = Box::pin(groups.run("acme", 1, run()));
        assert!((&mut first).now_or_never().is_none());
        tokio::task::yield_now().await;
        let mut second = Box::pin(groups.run("acme", 2, run()));
        let mut third = Box::pin(groups.run("acme", 3, run()));
        let mut gone = Box::pin(groups.run("acme", 4, run()));
        let mut other = Box::pin(groups.run("other", 5, run()));
        for waiting in [&mut second, &mut third, &mut gone, &mut other] {
            assert!(waiting.as_mut().now_or_never().is_none());
        }
        drop(gone);
        gate.add_permits(3);
        let sizes = tokio::join!(first, second, third, other);
        assert_eq!((sizes.0.unwrap(), sizes.1.unwrap(), sizes.2.unwrap(), sizes.3.unwrap()), (1, 2, 2, 1));
        assert!(groups.waiting().is_empty());
    }

    #[tokio::test]
    async fn after_a_panic_the_next_call_of_the_tenant_is_served() {
        let (groups, ran) = (GroupCommit::default(), Arc::new(AtomicUsize::new(0)));
        let run = |ran: Arc<AtomicUsize>| {
            move |calls| {
                ran.fetch_add(1, Ordering::Relaxed);
                size_of_group(calls, Arc::new(Semaphore::new(1)))
            }
        };
        assert!(groups.run("acme", u8::MAX, run(Arc::clone(&ran))).await.is_err());
        assert_eq!(groups.run("acme", 1, run(Arc::clone(&ran))).await.unwrap(), 1);
        assert_eq!(ran.load(Ordering::Relaxed), 2);
    }
}
