// Uploads through the generated client: one PUT, then parts; reads the state, completes, resolves, compares.
package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"reflect"
	"strings"

	"github.com/google/uuid"
	"sdk/contract"
)

const partSize = 5 << 20

var (
	ctx = context.Background()
	api *contract.ClientWithResponses
)

func check(holds bool, found any) {
	if !holds {
		log.Panicf("unexpected: %+v", found)
	}
}

func must[T any](value T, err error) T {
	if err != nil {
		log.Panic(err)
	}
	return value
}

func hexSha256(value []byte) *string {
	sum := sha256.Sum256(value)
	text := hex.EncodeToString(sum[:])
	return &text
}

func open(request contract.OpenUpload) contract.Upload {
	answer := must(api.OpenUploadWithResponse(ctx, nil, request))
	check(answer.JSON201 != nil, string(answer.Body))
	return *answer.JSON201
}

func put(method, url string, headers map[string]string, value []byte) {
	request := must(http.NewRequest(method, url, bytes.NewReader(value)))
	for name, text := range headers {
		if !strings.EqualFold(name, "content-length") {
			request.Header.Set(name, text)
		}
	}
	answer := must(http.DefaultClient.Do(request))
	defer answer.Body.Close()
	check(answer.StatusCode == http.StatusOK, answer.Status)
}

func putPart(part contract.SignedPart, value []byte) {
	put(part.Method, part.Url, part.Headers, value[part.Offset:part.Offset+part.Size])
}

// complete completes an upload. If the broker needs more time, it waits until the bytes are verified.
func complete(id uuid.UUID, request contract.CompleteUpload) contract.Pointer {
	answer := must(api.CompleteUploadWithResponse(ctx, id, request))
	completed := answer.JSON200
	if completed == nil {
		completed = answer.JSON202
	}
	check(completed != nil, string(answer.Body))
	switch found := must(completed.ValueByDiscriminator()).(type) {
	case contract.Published:
		check(found.Record.Offset >= 0, found)
		return found.Pointer
	case contract.Verified:
		return found.Pointer
	}
	for range 6 {
		wait := int64(10)
		read := must(api.GetUploadWithResponse(ctx, id, &contract.GetUploadParams{Wait: &wait}))
		check(read.JSON200 != nil, string(read.Body))
		if read.JSON200.Pointer != nil {
			return *read.JSON200.Pointer
		}
	}
	log.Panicf("upload %s is not verified after a minute", id)
	return contract.Pointer{}
}

func download(pointer contract.Pointer) []byte {
	topic := "sdk-go"
	answer := must(api.ResolvePointerWithResponse(ctx, &contract.ResolvePointerParams{Topic: &topic}, pointer))
	check(answer.JSON200 != nil, string(answer.Body))
	resolved := must(answer.JSON200.AsResolved())
	check(resolved.Size == pointer.Size, resolved)
	response := must(http.Get(resolved.Url))
	defer response.Body.Close()
	return must(io.ReadAll(response.Body))
}

func single() {
	value, key, headers := []byte("hello from a generated client"), "single", map[string]string{"a": "b"}
	upload := open(contract.OpenUpload{
		Topic: "sdk-go", Key: &key, Size: int64(len(value)), Sha256: hexSha256(value), Headers: &headers,
	})
	check(upload.Mode == contract.Single && upload.Upload != nil, upload)
	early := must(api.CompleteUploadWithResponse(ctx, upload.Id, contract.CompleteUpload{}))
	problem := early.ApplicationproblemJSON409
	check(problem != nil && problem.Code == contract.ObjectMissing && problem.Retryable, string(early.Body))
	put(upload.Upload.Method, upload.Upload.Url, upload.Upload.Headers, value)
	pointer := complete(upload.Id, contract.CompleteUpload{})
	// Go writes the members in another order than the broker. The broker must accept this order too.
	check(bytes.HasPrefix(must(json.Marshal(pointer)), []byte(`{"bucket":`)), pointer)
	check(bytes.Equal(download(pointer), value), "other bytes")
}

func parts() {
	value, key, size := make([]byte, 2*partSize+17), "parts", int64(partSize)
	rand.Read(value)
	upload := open(contract.OpenUpload{Topic: "sdk-go", Key: &key, Size: int64(len(value)), PartSize: &size})
	check(upload.Mode == contract.Multipart && *upload.PartCount == 3, upload)
	putPart((*upload.Parts)[0], value)
	// A client that has crashed can ask the broker which parts are missing in S3.
	now := must(api.GetUploadWithResponse(ctx, upload.Id, nil)).JSON200
	check(*now.Next == contract.PARTS && reflect.DeepEqual(*now.MissingParts, [][]int32{{2, 3}}), now)
	signed := must(api.SignPartsWithResponse(ctx, upload.Id, contract.SignParts{PartNumbers: &[]int32{2, 3}})).JSON200
	for _, part := range signed.Parts {
		putPart(part, value)
	}
	pointer := complete(upload.Id, contract.CompleteUpload{Sha256: hexSha256(value)})
	check(bytes.Equal(download(pointer), value), "other bytes")
}

func aborted() {
	upload := open(contract.OpenUpload{Topic: "sdk-go", Size: 1, Sha256: hexSha256(make([]byte, 1))})
	answer := must(api.AbortUploadWithResponse(ctx, upload.Id))
	check(answer.StatusCode() == http.StatusNoContent, answer.Status())
	var states []contract.UploadState
	for _, step := range must(api.GetUploadHistoryWithResponse(ctx, upload.Id, nil)).JSON200.Items {
		states = append(states, step.To)
	}
	check(reflect.DeepEqual(states, []contract.UploadState{contract.UploadStateOpen, contract.UploadStateAborted}), states)
}

func main() {
	log.SetFlags(0)
	api = must(contract.NewClientWithResponses(os.Getenv("LFS_BROKER_URL")))
	single()
	parts()
	aborted()
	fmt.Println("Go, oapi-codegen: one PUT and three parts were uploaded, completed, resolved and compared by a generated client")
}
