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

class UploadThresholdTest {
    private static final long MINUTE = TimeUnit.MINUTES.toNanos(1);

    private final LfsConfig config = new LfsConfig(Map.of("lfs.broker.url", "http://127.0.0.1:9"));
    private final AtomicInteger policyRequests = new AtomicInteger();
    private final AtomicLong now = new AtomicLong();
    private CompletableFuture<JsonNode> response = policyWith(1_000);

    private static CompletableFuture<JsonNode> policyWith(long minBytes) {
        return CompletableFuture.completedFuture(BrokerClient.MAPPER.createObjectNode().put("min_bytes", minBytes));
    }

    private UploadThreshold threshold(LongSupplier nanoTime) {
        return new UploadThreshold(config, topic -> {
            policyRequests.incrementAndGet();
            return response;
        }, nanoTime);
    }

    @Test
    void thePolicyIsRefreshedInTheBackgroundAfterAMinute() {
        UploadThreshold threshold = threshold(now::get);
        assertEquals(1_000, threshold.minBytes("t"));
        now.set(MINUTE);
        assertEquals(1_000, threshold.minBytes("t"));
        assertEquals(1, policyRequests.get());

        response = new CompletableFuture<>();
        now.set(MINUTE + 1);
        assertEquals(1_000, threshold.minBytes("t"));
        assertEquals(1_000, threshold.minBytes("t"));
        response.complete(policyWith(2_000).join());
        assertEquals(2_000, threshold.minBytes("t"));
        assertEquals(2, policyRequests.get());

        // If the broker is down, the last known value stays, and the next request follows a minute later.
        response = CompletableFuture.failedFuture(new LfsException.Unavailable("down", null));
        now.set(3 * MINUTE);
        assertEquals(2_000, threshold.minBytes("t"));
        assertEquals(2_000, threshold.minBytes("t"));
        response = policyWith(3_000);
        now.set(5 * MINUTE);
        threshold.minBytes("t");
        assertEquals(3_000, threshold.minBytes("t"));
        assertEquals(4, policyRequests.get());
    }

    /** Every thread finds the policy stale before any thread requests it. Then each thread enters the refresh in turn. */
    @Test
    void threadsThatFindTheSameStalePolicySendOneRequest() throws Exception {
        int threadCount = 16;
        CyclicBarrier barrier = new CyclicBarrier(threadCount);
        ThreadLocal<Boolean> waited = ThreadLocal.withInitial(() -> true);
        UploadThreshold threshold = threshold(() -> {
            long time = now.get();
            if (!waited.get()) {
                waited.set(true);
                try {
                    barrier.await(30, TimeUnit.SECONDS);
                } catch (Exception error) {
                    throw new IllegalStateException(error);
                }
            }
            return time;
        });
        threshold.minBytes("t");
        now.set(2 * MINUTE);
        var threads = new Thread[threadCount];
        for (int index = 0; index < threadCount; index++) {
            threads[index] = new Thread(() -> {
                waited.set(false);
                threshold.minBytes("t");
            });
            threads[index].start();
        }
        for (Thread thread : threads) {
            thread.join(TimeUnit.SECONDS.toMillis(60));
        }
        assertEquals(2, policyRequests.get());
    }
}
