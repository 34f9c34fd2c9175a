package lfsbroker.kafka;

import static org.junit.jupiter.api.Assertions.assertEquals;

import com.fasterxml.jackson.databind.JsonNode;
import java.util.Map;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.CyclicBarrier;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.concurrent.atomic.AtomicLong;
import java.util.function.LongSupplier;
import org.junit.jupiter.api.Test;

class ThresholdTest {
    private static final long MINUTE = TimeUnit.MINUTES.toNanos(1);

    private final LfsConfig config = new LfsConfig(Map.of("lfs.broker.url", "http://127.0.0.1:9"));
    private final AtomicInteger questions = new AtomicInteger();
    private final AtomicLong now = new AtomicLong();
    private CompletableFuture<JsonNode> answer = advises(1_000);

    private static CompletableFuture<JsonNode> advises(long bytes) {
        return CompletableFuture.completedFuture(Broker.MAPPER.createObjectNode().put("min_bytes", bytes));
    }

    private Threshold threshold(LongSupplier nanoTime) {
        return new Threshold(config, topic -> {
            questions.incrementAndGet();
            return answer;
        }, nanoTime);
    }

    @Test
    void adviceIsRefreshedAfterAMinuteBehindTheApplicationsBack() {
        Threshold threshold = threshold(now::get);
        assertEquals(1_000, threshold.of("t"));
        now.set(MINUTE);
        assertEquals(1_000, threshold.of("t"));
        assertEquals(1, questions.get());

        answer = new CompletableFuture<>();
        now.set(MINUTE + 1);
        assertEquals(1_000, threshold.of("t"));
        assertEquals(1_000, threshold.of("t"));
        answer.complete(advises(2_000).join());
        assertEquals(2_000, threshold.of("t"));
        assertEquals(2, questions.get());

        // A broker that is away leaves what was known, and is asked again a minute later.
        answer = CompletableFuture.failedFuture(new LfsException.Unavailable("away", null));
        now.set(3 * MINUTE);
        assertEquals(2_000, threshold.of("t"));
        assertEquals(2_000, threshold.of("t"));
        answer = advises(3_000);
        now.set(5 * MINUTE);
        threshold.of("t");
        assertEquals(3_000, threshold.of("t"));
        assertEquals(4, questions.get());
    }

    /** Every thread sees the old advice before any of them asks; each of them in turn then comes to ask. */
    @Test
    void manyThreadsThatFindOldAdviceAskOnce() throws Exception {
        int many = 16;
        CyclicBarrier together = new CyclicBarrier(many);
        ThreadLocal<Boolean> waited = ThreadLocal.withInitial(() -> true);
        Threshold threshold = threshold(() -> {
            long then = now.get();
            if (!waited.get()) {
                waited.set(true);
                try {
                    together.await(30, TimeUnit.SECONDS);
                } catch (Exception error) {
                    throw new IllegalStateException(error);
                }
            }
            return then;
        });
        threshold.of("t");
        now.set(2 * MINUTE);
        var threads = new Thread[many];
        for (int at = 0; at < many; at++) {
            threads[at] = new Thread(() -> {
                waited.set(false);
                threshold.of("t");
            });
            threads[at].start();
        }
        for (Thread thread : threads) {
            thread.join(TimeUnit.SECONDS.toMillis(60));
        }
        assertEquals(2, questions.get());
    }
}
