//! Holds a model against its promises: a sound design in every world within its bounds, a broken one until it fails.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeSet, HashMap};
use std::fmt::Debug;
use std::hash::{Hash, Hasher};
use std::time::Instant;

use stateright::{Checker, Expectation, HasDiscoveries, Model};

/// Far more than any of our bounds needs: a model that grows past it fails instead of filling the memory.
const MOST_STEPS: usize = 20_000_000;

/// Asserts that a design keeps each of its promises in every world within its bounds, and that the bounds are wide
/// enough for what they are meant to show.
pub(crate) fn check<M>(name: &str, model: M)
where
    M: Model + Clone + Send + Sync + 'static,
    M::State: Debug + Clone + PartialEq + Hash + Send + Sync,
    M::Action: Debug + Clone + PartialEq,
{
    let began = Instant::now();
    let checker = model.clone().checker().threads(2).target_state_count(MOST_STEPS);
    let checker = checker.finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    let (worlds, steps) = (checker.unique_state_count(), checker.state_count());
    eprintln!("{name}: {worlds} worlds, {steps} steps between them, {:.1} s", began.elapsed().as_secs_f64());
    assert!(steps < MOST_STEPS, "{name}: not all was looked at");
    checker.assert_properties();
    assert!(checker.is_done(), "{name}: not all was looked at");
    // A checker that stopped early would not have noticed itself.
    assert_eq!(walk(&model), worlds, "{name}: another walk finds another number of worlds");
}

/// Visits every world depth first, says how many there are, and asserts that none leads back to itself: each
/// behaviour comes to rest, and what is promised of worlds at rest is promised of every behaviour.
fn walk<M>(model: &M) -> usize
where
    M: Model,
    M::State: Debug + Hash,
{
    // By hash, whether the world is on the path to where we are.
    let mut seen: HashMap<u64, bool> = HashMap::new();
    let mut path = Vec::new();
    let mut next: Vec<M::State> = model.init_states();
    loop {
        if let Some(world) = next.pop() {
            let mut hasher = DefaultHasher::new();
            world.hash(&mut hasher);
            let hash = hasher.finish();
            match seen.get(&hash) {
                Some(true) => panic!("a behaviour comes back to {world:?}"),
                Some(false) => {}
                None => {
                    let mut actions = Vec::new();
                    model.actions(&world, &mut actions);
                    seen.insert(hash, true);
                    path.push((hash, world, actions));
                }
            }
        }
        let Some((hash, world, actions)) = path.last_mut() else { return seen.len() };
        match actions.pop() {
            Some(action) => next.extend(model.next_state(world, action)),
            None => {
                seen.insert(*hash, false);
                path.pop();
            }
        }
    }
}

/// Asserts that a design breaks a promise, and shows a shortest behaviour that does.
pub(crate) fn refute<M>(name: &str, model: M, promise: &'static str)
where
    M: Model + Clone + Send + Sync + 'static,
    M::State: Debug + Clone + PartialEq + Hash + Send + Sync,
    M::Action: Debug + Clone + PartialEq,
{
    let is_promise = |property: &stateright::Property<M>| property.name == promise && property.expectation == Expectation::Always;
    assert!(model.properties().iter().any(is_promise), "{name}: nothing is promised as `{promise}`");
    let began = Instant::now();
    let mut worlds = 0;
    let mut find = |depth: usize| {
        let checker = model.clone().checker().target_state_count(MOST_STEPS).target_max_depth(depth);
        let checker = checker.finish_when(HasDiscoveries::AllOf(BTreeSet::from([promise]))).spawn_bfs().join();
        worlds = worlds.max(checker.unique_state_count());
        checker.discovery(promise).map(|path| path.into_actions())
    };
    let Some(mut actions) = find(usize::MAX) else { panic!("{name}: it is so that {promise}") };
    // The checker keeps the last that it found before it looked up, not the first. A path of n steps is n + 1 deep,
    // and what lies at a given depth is left out.
    while let Some(shorter) = find(actions.len() + 1) {
        actions = shorter;
    }
    let seconds = began.elapsed().as_secs_f64();
    eprintln!("{name}: not so that {promise}: {} steps, {worlds} worlds, {seconds:.1} s", actions.len());
    for action in actions {
        eprintln!("    {action:?}");
    }
}
