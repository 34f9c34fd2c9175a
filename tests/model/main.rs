//! The protocol, checked.

mod completion;
mod publication;

use std::collections::{BTreeSet, HashMap};
use std::collections::hash_map::DefaultHasher;
use std::fmt::Debug;
use std::hash::{Hash, Hasher};
use std::time::Instant;

use stateright::{Checker, Expectation, HasDiscoveries, Model};
use publication::*;

/// Looks at every world within the bounds, and holds each against every promise.
fn check<M>(name: &str, model: M)
where
    M: Model + Clone + Send + Sync + 'static,
    M::State: Debug + Clone + PartialEq + Hash + Send + Sync,
    M::Action: Debug + Clone + PartialEq,
{
    let began = Instant::now();
    let checker = model.clone().checker().threads(2).spawn_bfs().join();
    let (worlds, depth) = (checker.unique_state_count(), checker.max_depth());
    let a = began.elapsed().as_secs_f64();
    eprintln!("{name}: {worlds} worlds, {} transitions {depth} steps deep, {a:.1} s", checker.state_count());
    let (all, longest) = rest(&model);
    eprintln!("{name}: {all} worlds, longest {longest}, {:.1} s", began.elapsed().as_secs_f64() - a);
    checker.assert_properties();
    assert_eq!(all, worlds);
}

/// Visits every world again, depth first
fn rest<M>(model: &M) -> (usize, usize)
where
    M: Model,
    M::State: Hash + Debug,
    M::Action: Debug,
{
    fn key(state: &impl Hash) -> u64 {
        let mut hasher = DefaultHasher::new();
        state.hash(&mut hasher);
        hasher.finish()
    }
    let mut is_open: HashMap<u64, bool> = HashMap::new();
    let mut path = Vec::new();
    let mut longest = 0;
    for state in model.init_states() {
        let mut actions = Vec::new();
        model.actions(&state, &mut actions);
        is_open.insert(key(&state), true);
        path.push((key(&state), state, actions));
    }
    while let Some((_, state, actions)) = path.last_mut() {
        let Some(action) = actions.pop() else {
            let (key, ..) = path.pop().unwrap();
            is_open.insert(key, false);
            continue;
        };
        let Some(next) = model.next_state(state, action) else { continue };
        let k = key(&next);
        match is_open.get(&k) {
            Some(true) => panic!("comes back to {next:?}"),
            Some(false) => continue,
            None => {
                is_open.insert(k, true);
                let mut actions = Vec::new();
                model.actions(&next, &mut actions);
                path.push((k, next, actions));
                longest = longest.max(path.len());
            }
        }
    }
    (is_open.len(), longest)
}

fn refute<M>(name: &str, model: M, promise: &'static str)
where
    M: Model + Clone + Send + Sync + 'static,
    M::State: Debug + Clone + PartialEq + Hash + Send + Sync,
    M::Action: Debug + Clone + PartialEq,
{
    let began = Instant::now();
    assert!(model.properties().iter().any(|p| p.name == promise && p.expectation == Expectation::Always));
    let find = |depth: usize| {
        let goal = HasDiscoveries::AllOf(BTreeSet::from([promise]));
        let checker = model.clone().checker().finish_when(goal).target_max_depth(depth).spawn_bfs().join();
        (checker.discovery(promise), checker.unique_state_count())
    };
    let (Some(mut path), worlds) = find(1000) else { panic!("{name}: `{promise}` holds") };
    let first = path.clone().into_actions().len();
    loop {
        let steps = path.clone().into_actions().len();
        let Some(shorter) = find(steps + 1).0 else { break };
        path = shorter;
    }
    let actions = path.into_actions();
    eprintln!("{name}: not so that {promise}: {} (first {first}) steps, {worlds} worlds, {:.1} s", actions.len(), began.elapsed().as_secs_f64());
    for action in actions {
        eprintln!("    {action:?}");
    }
}

#[test]
fn house() {
    let c = |name: &str, d: u8| std::env::var(name).map_or(d, |v| v.parse().unwrap());
    let keys: &'static [u8] = std::env::var("KEYS").unwrap_or("aa".into()).leak().as_bytes();
    check("keys", Publication::house(keys, c("CRASHES", 1), c("FAULTS", 1)));
}

#[test]
fn broken() {
    let h = Publication::house(b"aa", 1, 2);
    let d = Design::HOUSE;
    refute("no fence", Publication { design: Design { fences: false, ..d }, ..h }, NEVER_TWICE);
    refute("no readback", Publication { design: Design { settling: Settling::Unread, ..d }, ..h }, NEVER_TWICE);
    refute("neither", Publication { design: Design { fences: false, settling: Settling::Unread, ..d }, ..h }, NEVER_TWICE);
    refute("unsettled", Publication { design: Design { settles_first: false, ..d }, ..h }, NEVER_TWICE);
    refute("by number", Publication { design: Design { settles_first: false, settling: Settling::ByNumber, ..d }, ..h }, TRULY_MARKED);
    refute("park key", Publication { design: Design { parks_the_key: false, ..d }, ..h }, IN_ORDER);
    refute("key lock", Publication { design: Design { locks_the_key: false, ..d }, ..h }, IN_ORDER);
    refute("cursor", Publication { design: Design { has_cursor: true, ..d }, keys: b"ab", ..h }, NEVER_LOST);
    refute("unstamp", Publication { design: Design { unstamps_as_owner: false, ..d }, ..h }, NEVER_TWICE);
    refute("park", Publication { design: Design { parks_by_stamp: false, ..d }, ..h }, NEVER_TWICE);
}

#[test]
fn completion() {
    use completion::*;
    let c = |name: &str, d: u8| std::env::var(name).map_or(d, |v| v.parse().unwrap());
    let (asks, crashes, faults) = (c("ASKS", 2), c("CRASHES", 1), c("FAULTS", 1));
    check("single", Completion::house(Layout::Single, asks, crashes, faults));
    check("read back", Completion::house(Layout::ReadBack, asks, crashes, faults));
    check("multi", Completion::house(Layout::Multipart, asks, crashes, faults));
}

#[test]
fn cbroken() {
    use completion::*;
    let h = Completion::house(Layout::Single, 2, 1, 2);
    let m = Completion { layout: Layout::Multipart, ..h};
    let d = Design::HOUSE;
    refute("plain", Completion { design: Design { puts_once: false, ..d }, ..h }, SAME_BYTES);
    refute("one sweep", Completion { design: Design { sweeps_twice: false, ..d }, ..h }, NOTHING_LEFT);
    refute("one sweep parts", Completion { design: Design { sweeps_twice: false, ..d }, ..m }, NOTHING_LEFT);
    refute("sweep known", Completion { design: Design { sweeps_all: false, ..d }, ..m }, NOTHING_LEFT);
    refute("destroy first", Completion { design: Design { decides_first: false, ..d }, ..h }, SAME_BYTES);
    refute("guard", Completion { design: Design { guards_moves: false, ..d }, ..h }, ONE_END);
}
