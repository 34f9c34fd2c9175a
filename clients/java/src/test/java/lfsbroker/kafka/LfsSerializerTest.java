package lfsbroker.kafka;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.fasterxml.jackson.databind.JsonNode;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.util.List;
import java.util.concurrent.CopyOnWriteArrayList;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

class LfsSerializerTest {
    private static final byte[] HELLO = "hello".getBytes(StandardCharsets.UTF_8);
    private static final String EXPIRED = "<Error><Code>ExpiredToken</Code><Message>over</Message></Error>";
    private static final String DONE = "{\"state\":\"published\",\"pointer\":{\"kfs_lfs\":1}}";
    private static final String POINTER = "{\"kfs_lfs\":1}";

    private final Stranger stranger;

    LfsSerializerTest() throws IOException {
        stranger = new Stranger();
        stranger.on("POST /lfs/uploads/1/complete", Stranger.text(200, DONE)).on("DELETE /lfs/uploads/1", Stranger.text(200, "{}"));
    }

    @AfterEach
    void end() {
        stranger.close();
    }

    private String serialized(byte[] value) {
        try (LfsSerializer<byte[]> serializer = stranger.serializer()) {
            return new String(serializer.serialize("t", value), StandardCharsets.UTF_8);
        }
    }

    private Stranger.Answer single(String path) {
        return Stranger.text(201, "{\"id\":\"1\",\"state\":\"open\",\"mode\":\"single\",\"upload\":" + stranger.signed("PUT", path) + "}");
    }

    /** Open signs parts whose URLs are over at once; only the one that was signed last is good. */
    @Test
    void aSlowUploadOutlivesItsFirstUrls() throws IOException {
        var good = new int[1];
        StringBuilder first = new StringBuilder();
        for (int number = 1; number <= 5; number++) {
            first.append(number == 1 ? "" : ",").append(part(number));
            int here = number;
            stranger.on("PUT /part/" + number, (exchange, body) -> Stranger.send(exchange, here == good[0] ? 200 : 403, ""));
        }
        stranger.on("POST /lfs/uploads", Stranger.text(
                201, "{\"id\":\"1\",\"state\":\"open\",\"mode\":\"multipart\",\"part_count\":5,\"parts\":[" + first + "]}"));
        stranger.on("POST /lfs/uploads/1/parts", (exchange, body) -> {
            JsonNode numbers = Broker.MAPPER.readTree(body).path("part_numbers");
            StringBuilder parts = new StringBuilder();
            for (JsonNode number : numbers) {
                good[0] = number.asInt();
                parts.append(parts.isEmpty() ? "" : ",").append(part(number.asInt()));
            }
            Stranger.send(exchange, 200, "{\"parts\":[" + parts + "]}");
        });
        assertEquals(POINTER, serialized(new byte[(64 << 20) + 1]));
        for (int number = 1; number <= 5; number++) {
            assertEquals(1, stranger.count("PUT /part/" + number), stranger.asked.toString());
        }
    }

    private String part(int number) {
        int offset = (number - 1) * (16 << 20);
        return "{\"part_number\":" + number + ",\"offset\":" + offset + ",\"size\":" + Math.min(16 << 20, (64 << 20) + 1 - offset)
                + ",\"method\":\"PUT\",\"url\":\"" + stranger.url() + "/part/" + number + "\"}";
    }

    @ParameterizedTest
    @CsvSource({"403,''", "400," + EXPIRED})
    void aUrlThatRanOutIsSignedOnceMore(int status, String said) {
        List<String> keys = new CopyOnWriteArrayList<>();
        Stranger.Answer again = single("/second");
        stranger.on(
                "POST /lfs/uploads",
                (exchange, body) -> {
                    keys.add(exchange.getRequestHeaders().getFirst("idempotency-key") + new String(body, StandardCharsets.UTF_8));
                    (keys.size() == 1 ? single("/first") : again).to(exchange, body);
                });
        stranger.on("PUT /first", Stranger.text(status, said)).on("PUT /second", Stranger.text(200, ""));
        assertEquals(POINTER, serialized(HELLO));
        // The same question, so that it is the same upload.
        assertEquals(2, keys.size());
        assertEquals(keys.get(0), keys.get(1));
    }

    @Test
    void whatS3RefusesForGoodIsRefusedAndLeftBehindByNobody() {
        stranger.on("POST /lfs/uploads", single("/object"));
        stranger.on("PUT /object", Stranger.text(400, EXPIRED));
        assertEquals("ExpiredToken", assertThrows(LfsException.Refused.class, () -> serialized(HELLO)).code());
        assertEquals(2, stranger.count("PUT /object"));
        stranger.on("PUT /object", Stranger.text(400, "<Error><Code>BadDigest</Code></Error>"));
        assertEquals("BadDigest", assertThrows(LfsException.Refused.class, () -> serialized(HELLO)).code());
        assertEquals(3, stranger.count("PUT /object"));
        assertEquals(2, stranger.count("DELETE /lfs/uploads/1"));
    }

    @Test
    void anUploadThatEndedMeanwhileIsNotSignedAgain() {
        stranger.on("POST /lfs/uploads", single("/object"), Stranger.text(200, "{\"id\":\"1\",\"state\":\"expired\"}"));
        stranger.on("PUT /object", Stranger.text(403, ""));
        assertEquals("expired", assertThrows(LfsException.Refused.class, () -> serialized(HELLO)).code());
    }

    @Test
    void whatIsNotDecidedYetIsTriedAgain() {
        Stranger.Answer inFlight = Stranger.text(409, "{\"code\":\"idempotency-in-flight\"}");
        stranger.on("POST /lfs/uploads", inFlight, single("/object"));
        stranger.on("PUT /object", Stranger.text(409, "<Error><Code>ConditionalRequestConflict</Code></Error>"), Stranger.text(200, ""));
        assertEquals(POINTER, serialized(HELLO));
        assertEquals(2, stranger.count("POST /lfs/uploads"));
        assertEquals(2, stranger.count("PUT /object"));
    }

    @Test
    void aConflictOfAnyOtherRequestIsAnAnswer() {
        stranger.on("POST /lfs/uploads", single("/object")).on("PUT /object", Stranger.text(200, ""));
        stranger.on("POST /lfs/uploads/1/complete", Stranger.text(409, "{\"code\":\"object-missing\"}"));
        assertEquals("object-missing", assertThrows(LfsException.Refused.class, () -> serialized(HELLO)).code());
        assertEquals(1, stranger.count("POST /lfs/uploads/1/complete"));
    }

    @Test
    void whoDoesNotAnswerIsNotAskedToAbort() {
        stranger.on("POST /lfs/uploads", single("/object")).on("PUT /object", Stranger.text(200, ""));
        stranger.on("POST /lfs/uploads/1/complete", Stranger.text(503, "{}"));
        assertThrows(LfsException.Unavailable.class, () -> serialized(HELLO));
        assertEquals(0, stranger.count("DELETE /lfs/uploads/1"));
    }

    @Test
    void theLargestArrayHasAWholeNumberOfParts() {
        assertEquals(5, LfsSerializer.parts((64 << 20) + 1));
        assertEquals(128, LfsSerializer.parts(Integer.MAX_VALUE - 8));
        assertTrue(127L * (16 << 20) < Integer.MAX_VALUE, "the last part's offset is an int");
    }
}
